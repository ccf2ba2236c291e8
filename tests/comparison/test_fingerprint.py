"""Model against model: copies are told from models of other seeds."""

import copy
import random

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmbrain import InputError
from llmbrain.comparison.fingerprints import (
    ModelNetworks,
    align_and_correlate,
    common_units,
    corrmap,
    fingerprint,
    networks_of,
    published_correlations,
    shared_space,
    to_units,
)
from llmbrain.datasets.abilities import stream_examples
from llmbrain.pruning import plan_pruning, prune

N_SEEDS, STEPS, N_COMPONENTS = 5, 60, 12
ALPHA = 0.1  # five models: a pair beside the nine pairs with and among the other three, so no p is below 1/10


def text_of(split, seed, n_characters):
    examples = stream_examples(split, random.Random(seed))
    text = ""
    while len(text) < n_characters:
        text += next(examples).text
    return text[:n_characters]


@pytest.fixture(scope="module")
def tokenizer():
    """The demo brain's: one token a character."""
    characters = ["<unk>", "<s>", "<pad>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")


def train(model, tokenizer, steps, seed, rate=3e-3):
    """The demo brain's recipe in small: lines of the eight abilities, made on the fly."""
    ids = torch.tensor(tokenizer(text_of("train", seed, steps * 8 * 64)).input_ids[: steps * 8 * 64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for batch in ids.reshape(steps, 8, 64):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def make_model(seed, tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=96, num_hidden_layers=3,
                num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=2,
            )
        )  # fmt: skip
    return train(model, tokenizer, STEPS, seed)


def permuted(model, seed):
    """The same function with MLP neurons in another order."""
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        order = torch.randperm(layer.mlp.up_proj.out_features, generator=torch.Generator().manual_seed(seed))
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.data = projection.weight.data[order]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order]
    return twin


@pytest.fixture(scope="module")
def families(tokenizer):
    """Per seed: networks of a trained model, and of its pruned, fine-tuned and permuted copies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    texts = [text_of("heldout", 100 + i, 120) for i in range(8)]
    found = []
    for seed in range(N_SEEDS):
        model = make_model(seed, tokenizer)
        copies = {
            "original": model,
            "pruned": prune(copy.deepcopy(model), plan_pruning(model, ratio=0.25, method="magnitude")),
            "fine-tuned": train(copy.deepcopy(model), tokenizer, 25, 1000 + seed, rate=1e-3),
            "permuted": permuted(model, seed),
        }
        found.append(
            {name: networks_of((m, tokenizer), texts, n_components=N_COMPONENTS) for name, m in copies.items()}
        )
    torch.set_num_threads(threads)
    return found


def score(a, b):
    return fingerprint(a, b, n_permutations=1).score


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*converge")
def test_copies_are_told_from_other_seeds(families):
    copies = ("pruned", "fine-tuned", "permuted")
    related = [score(family["original"], family[name]) for family in families for name in copies]
    unrelated = [
        score(families[i]["original"], families[j][name])
        for i in range(N_SEEDS)
        for j in range(N_SEEDS)
        if i != j
        for name in ("original", "pruned")
        if name == "pruned" or i < j
    ]
    assert len(related) + len(unrelated) >= 20
    auc = np.mean([a > b for a in related for b in unrelated])
    assert auc == 1.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*converge")
def test_verdicts_find_copies_and_keep_their_level_with_strangers(families):
    """Originals of other seeds are the reference; strangers are originals, and copies of other seeds."""

    def verdict(i, j, name):
        others = [families[k]["original"] for k in range(N_SEEDS) if k not in (i, j)][:3]
        found = fingerprint(families[i]["original"], families[j][name], reference=others, alpha=ALPHA, n_permutations=1)
        assert len(found.reference) == 9
        return found.verdict.startswith("related, or both follow the text better")

    assert all(verdict(i, i, name) for i in range(N_SEEDS) for name in ("pruned", "fine-tuned", "permuted"))
    for name in families[0]:
        rate = np.mean([verdict(i, j, name) for i in range(N_SEEDS) for j in range(N_SEEDS) if i != j])
        assert rate <= 0.3, name  # .1 expected; 20 pairs of 5 models, which are not independent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*converge")
def test_strangers_share_the_text_and_no_verdict_is_given_without_references(families):
    original, stranger = families[0]["original"], families[1]["original"]
    found = fingerprint(original, stranger, n_permutations=19)
    assert found.p_shared == pytest.approx(1 / 20)  # they do follow the same text: no sign of kinship
    assert found.verdict.startswith("undecided")
    few = fingerprint(original, stranger, reference=[families[2]["original"]], alpha=ALPHA, n_permutations=1)
    assert few.verdict.startswith("undecided: 2 pairs")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*converge")
def test_networks_are_found_again_in_copies(families):
    original, tuned = families[0]["original"], families[0]["fine-tuned"]
    twin = copy.deepcopy(original)  # the same networks in another order, with other signs
    twin.time_courses = [-course[:, ::-1] for course in original.time_courses]
    found = corrmap(original, [twin, tuned], 2, threshold=0.4)
    assert found["found"].all()
    assert found.loc[0, ["network", "first_rho"]].tolist() == [N_COMPONENTS - 3, pytest.approx(-1.0)]
    rho = np.abs(align_and_correlate(original, twin))
    np.testing.assert_allclose(np.diag(rho[:, ::-1]), 1.0)


def test_shared_space_is_cca_and_does_not_see_rotations():
    from sklearn.cross_decomposition import CCA

    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = np.column_stack([x[:, 0] + rng.normal(size=200), rng.normal(size=(200, 2))])
    span = np.column_stack([np.arange(200), np.arange(1, 201)])
    a, b, c = (ModelNetworks([s], [s], [span], ["t"]) for s in (x, y, x @ rng.normal(size=(3, 3))))
    u, v = CCA(n_components=3, max_iter=5000, tol=1e-10).fit(x, y).transform(x, y)
    expected = np.mean([np.corrcoef(u[:, i], v[:, i])[0, 1] ** 2 for i in range(3)])
    assert shared_space(a, b) == pytest.approx(expected, abs=1e-6)
    assert shared_space(a, c) == pytest.approx(1.0)


def test_units_end_where_all_tokenizers_do():
    #        the_rabbit: the|rabbit, th|e|rab|bit
    coarse = np.array([[0, 0], [0, 3], [4, 10]])
    fine = np.array([[0, 2], [2, 3], [4, 7], [7, 10]])
    a, b = common_units([coarse, fine])
    assert a.tolist() == [-1, 0, 1]
    assert b.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(to_units(np.array([[1.0], [3], [5], [9]]), b, 2), [[2], [7]])


def test_published_correlations_cut_the_longer_series():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = [rng.normal(size=(30, 2)) for _ in range(2)], [rng.normal(size=(25, 3)) for _ in range(2)]
    a, b = (ModelNetworks(s, s, [np.zeros((len(s[0]), 2), int)] * 2, ["a", "b"]) for s in (x, y))
    expected = np.mean([[[spearmanr(u[:25, i], v[:, j]).statistic for j in range(3)] for i in range(2)]
                        for u, v in zip(x, y)], axis=0)  # fmt: skip
    np.testing.assert_allclose(published_correlations(a, b), expected)


def test_bad_models(tokenizer):
    with pytest.raises(InputError, match="a list of texts"):
        networks_of((None, tokenizer), "one text")
    with pytest.raises(InputError, match=r"pass \(model, tokenizer\), a path or scans"):
        networks_of(3, ["a text"])
