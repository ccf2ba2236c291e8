"""What a model promises is tried on the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, MODELS, VOCAB, randomise, tiny, tiny_tokenizer
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FNetConfig,
    FNetModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import llmbrain as lb
from llmbrain import InputError
from llmbrain.anatomy.families import context_length
from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.hooks.probe import is_causal, ordinary_ids
from llmbrain.intervention import TokenEvaluation, score_conditions

CAUSAL = [name for name, (_, kind, _) in MODELS.items() if "ForCausalLM" in kind or "LMHead" in kind]
WINDOWS = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


def bert(**changes):
    import transformers

    config = transformers.BertConfig(**{**MODELS["bert"][2], **changes})
    model = transformers.BertLMHeadModel(config)
    randomise(model)
    return model.eval()


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=VOCAB, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24,
                        max_position_embeddings=CONTEXT, **sizes)  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def t5():
    config = T5Config(vocab_size=VOCAB, d_model=16, d_ff=24, d_kv=4, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


def xlnet():
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=4, d_inner=24))
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_are_causal(family, dtype):
    assert predicts_next_token(tiny(family, dtype=dtype))


@pytest.mark.parametrize(
    "make",
    [bert, bart, t5, xlnet, lambda: tiny("bert"), lambda: tiny("gemma3", use_bidirectional_attention=True)],
    ids=["bert without is_decoder", "bart", "t5", "xlnet", "masked", "bidirectional gemma 3"],
)
def test_models_that_see_the_future_have_no_perplexity(make):
    model = make()
    assert not predicts_next_token(model)
    with pytest.raises(InputError, match="has no next-token perplexity"):
        lb.perplexity(model, None, WINDOWS)


def test_a_bert_that_decodes_has_one():
    assert lb.perplexity(bert(is_decoder=True), None, WINDOWS) > 1
    with pytest.raises(InputError, match="has no next-token perplexity"):
        score_conditions(bert(), np.ones((1, 48)), {"text": TokenEvaluation.from_texts(bert(), None, WINDOWS)})


def test_the_probe_reads_no_special_token():
    model = tiny("llama", bos_token_id=7, eos_token_id=[8, 9])
    ids = ordinary_ids(model, 20).tolist()
    assert len(set(ids)) == 20
    assert not set(ids) & {0, 7, 8, 9}
    assert is_causal(model)


def test_no_limit_of_positions():
    assert context_length(xlnet()) is None


def fnet():
    config = FNetConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        max_position_embeddings=CONTEXT, pad_token_id=0)  # fmt: skip
    model = FNetModel(config)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("make", [fnet, lambda: tiny("bert"), lambda: tiny("llama"), lambda: tiny("bloom")])
def test_a_text_alone_equals_the_text_in_a_batch(make):
    """FNet mixes all positions, padded ones too: its texts are read by length."""
    model, tokenizer = make(), tiny_tokenizer()
    texts = ["abc", "a longer one, that pads", "xyz", "uvw", "b"]
    together = lb.scan(model, tokenizer, texts)
    for text, scan in zip(texts, together):
        np.testing.assert_allclose(scan.data(), lb.scan(model, tokenizer, text)[0].data(), atol=1e-5)


def test_an_end_of_sequence_is_no_part_of_an_answer():
    tokenizer = tiny_tokenizer()
    plain = TokenEvaluation.from_answers(tokenizer, ["ab", "abc"], ["cd", "d"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <pad>", special_tokens=[("<s>", 1), ("<pad>", 0)]
    )
    ended = TokenEvaluation.from_answers(tokenizer, ["ab", "abc"], ["cd", "d"])
    torch.testing.assert_close(ended.ids, plain.ids)
    torch.testing.assert_close(ended.scored, plain.scored)


def test_no_weights_are_cut_while_a_change_is_in_force():
    model = tiny("llama")
    plan = lb.plan_pruning(model, ratio=0.5, method="magnitude")
    with lb.lesion(model, [(0, 3)]), pytest.raises(InputError, match="prune: the model is changed"):
        lb.prune(model, plan, compensate=None)
    assert lb.prune(model, plan, compensate=None) is not model
