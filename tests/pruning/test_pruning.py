"""Plans and cuts: the cut model equals the original with those neurons set to zero, on every family."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import MODELS, VOCAB, tiny, tiny_tokenizer

from llmbrain import InputError, PruningPlan, load_pruned, plan_pruning, prune, save_pruned, scan
from llmbrain.anatomy.families import anatomy
from llmbrain.pruning.calibrate.gradients import gradient_pass
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.plan import weights_digest

FAMILIES = sorted(set(MODELS) - {"mixtral"})
CAUSAL = sorted(set(FAMILIES) - {"bert", "roberta", "distilbert", "modernbert"})
IDS = torch.arange(3, 3 + 24).reshape(2, 12) % VOCAB


def windows(n=40, length=16, seed=0):
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_zeros(model, kept):
    """The model with all other neurons' signals multiplied by zero, by hooks of our own."""
    handles = []
    for layer, units in zip(anatomy(model).layers, kept):
        mask = torch.zeros(layer.width).index_fill_(0, torch.as_tensor(units), 1.0)
        handles.append(layer.down.module.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,)))
    out = logits(model)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_equals_the_neurons_set_to_zero(name):
    model = tiny(name)
    plan = plan_pruning(model, ratio=0.2, method="random", protect=[0], random_state=3)
    dense, expected = logits(model), with_zeros(model, plan.kept)
    small = prune(model, plan)
    assert anatomy(small).widths == plan.widths != plan.widths_before
    assert torch.allclose(logits(small), expected, atol=1e-5)
    assert not torch.allclose(dense, expected, atol=1e-3)
    assert torch.equal(logits(model), dense)  # the model passed is untouched
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone == plan.parameters_removed > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_least_squares_is_exact_where_nothing_is_lost(name):
    """Neurons that repeat others can be refitted without a trace, whatever surrounds the MLP."""
    model = tiny(name)
    for layer in anatomy(model).layers:
        half = layer.width // 2
        with torch.no_grad():
            for projection in layer.inputs:
                projection.weight()[half:] = projection.weight()[:half]
                if projection.bias() is not None:
                    projection.bias()[half:] = projection.bias()[:half]
    plan = plan_pruning(model, ratio=0.5, method="random")
    kept = tuple(np.arange(w // 2) for w in plan.widths_before)
    plan = PruningPlan.from_dict({**plan.to_dict(), "kept": [k.tolist() for k in kept]})
    small = prune(model, plan, calibration=windows(), compensate="least-squares", ridge=1e-9)
    assert torch.allclose(logits(small), logits(model), atol=2e-3)
    assert not torch.allclose(logits(prune(model, plan)), logits(model), atol=0.05)


def test_least_squares_equals_ridge_of_scikit_learn():
    from sklearn.linear_model import Ridge

    model, ids = tiny("llama", num_hidden_layers=1), windows(60)
    plan = plan_pruning(model, ratio=0.5, method="random")
    layer = anatomy(model).layers[0]
    caught = {}
    handle = layer.down.module.register_forward_hook(lambda m, a, o: caught.update(x=a[0], y=o))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    x, y = (caught[k].flatten(0, 1).double().numpy() for k in "xy")
    old = layer.down.weight().detach().double().numpy()[plan.kept[0]]
    penalty = 1e-2 * x.var(0).mean() * len(x)
    fitted = Ridge(alpha=penalty).fit(x[:, plan.kept[0]], y - x[:, plan.kept[0]] @ old)
    small = prune(model, plan, calibration=ids, compensate="least-squares", ridge=1e-2)
    down = anatomy(small).layers[0].down
    assert np.allclose(down.weight().detach().numpy(), old + fitted.coef_.T, atol=1e-4)
    assert np.allclose(down.module.bias.detach().numpy(), fitted.intercept_, atol=1e-4)


@pytest.mark.parametrize("compensate", ["bias", "least-squares"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3", "bloom", "falcon", "opt"])
def test_compensated_models_travel(name, compensate, tmp_path):
    model = tiny(name)
    plan = plan_pruning(model, ratio=0.4, method="flap", allocation="global", calibration=windows())
    small = prune(model, plan, calibration=windows(), compensate=compensate)
    save_pruned(small, None, tmp_path / "p")
    assert torch.equal(logits(load_pruned(tmp_path / "p")), logits(small))


@pytest.mark.parametrize("method", sorted(CRITERIA))
def test_every_method_meets_the_budget_exactly_and_repeats(method):
    model, ids = tiny("llama", num_hidden_layers=3), windows()
    rule = {"n_components": 6}
    plans = [plan_pruning(model, ratio=0.31, method=method, calibration=ids, rule=rule) for _ in range(2)]
    assert sum(plans[0].widths) == 72 - round(0.31 * 72)
    assert all(np.array_equal(a, b) for a, b in zip(plans[0].kept, plans[1].kept))
    assert all((np.diff(k) > 0).all() and k.min() >= 0 and k.max() < 24 for k in plans[0].kept)


def test_the_published_rule_against_plain_numpy():
    """The rule written out: z-score, SVD, sklearn's FastICA with cube, |z| of maps, union, threshold."""
    from scipy.linalg import sqrtm
    from sklearn.decomposition import FastICA
    from sklearn.utils.extmath import svd_flip

    model, tokenizer = tiny("llama", intermediate_size=96), tiny_tokenizer()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop .,"), 60)) for _ in range(6)]
    scans = scan(model, tokenizer, texts, site=("gate", "up"))
    k = 3
    plan = plan_pruning(model, None, scans, ratio=0.25, method="published", rule={"n_components": k, "n_groups": 2})
    scores = []
    for layer in range(2):
        best = np.zeros(96)
        for group in (scans[:3], scans[3:]):
            x = np.concatenate(
                [np.concatenate([s.data([layer], site=site) for s in group]) for site in ("gate", "up")], axis=1
            ).astype(float)
            x = (x - x.mean(0)) / x.std(0)
            left = svd_flip(*np.linalg.svd(x.T, full_matrices=False)[::2])[0][:, :k]
            centred = left - left.mean(0)
            white = centred @ np.linalg.inv(sqrtm(centred.T @ centred)) * np.sqrt(192)
            start = np.random.RandomState(0).normal(size=(k, k))
            maps = FastICA(fun="cube", max_iter=300, tol=1e-4, w_init=start, whiten=False).fit_transform(white).T
            z = np.abs((maps - maps.mean(1, keepdims=True)) / maps.std(1, keepdims=True))
            best = np.maximum(best, z.max(0).reshape(2, 96).max(0))
        scores.append(best)
    order = np.argsort(-np.concatenate(scores))[:144]
    assert set(np.flatnonzero(plan.mask)) == set(order)
    assert plan.details["published"]["ica_runs"] == 4
    assert plan.details["published"]["ica_not_converged"] == 0
    cut = np.delete(np.concatenate(scores), order)
    assert plan.details["threshold"] == pytest.approx(cut.max(), rel=1e-3)


def test_the_published_rule_protects_first_three_and_last_two():
    ids = windows(20)
    plan = plan_pruning(tiny("llama", num_hidden_layers=7), ratio=0.2, method="published", calibration=ids,
                        rule={"n_components": 5})  # fmt: skip
    assert plan.protect == (0, 1, 2, 5, 6)
    assert [w for i, w in enumerate(plan.widths) if i in plan.protect] == [24] * 5
    assert sum(plan.widths) == 168 - round(0.2 * 168)
    small = plan_pruning(tiny("llama"), ratio=0.2, method="published", calibration=ids, rule={"n_components": 5})
    assert small.protect == ()
    assert "none is protected" in small.summary()
    with pytest.raises(InputError, match=r"ratio=0\.5 leaves 84 of 168 units.*largest ratio is 0\.2"):
        plan_pruning(tiny("llama", num_hidden_layers=7), ratio=0.5, method="published", calibration=ids)


def test_a_model_without_gate_is_read_at_the_neuron():
    plan = plan_pruning(tiny("gpt2"), ratio=0.2, method="published", calibration=windows(20), rule={"n_components": 5})
    assert plan.details["published"]["sites"] == ["neuron"]
    assert "no gate" in plan.summary()


def test_plans_are_saved_and_replayed(tmp_path):
    model = tiny("gpt2")
    plan = plan_pruning(model, ratio=0.3, method="magnitude", protect=[-1])
    back = PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert back.to_dict() == plan.to_dict()
    assert torch.equal(logits(prune(model, back)), logits(prune(model, plan)))
    frame = back.to_frame()
    assert frame["kept"].tolist() == [48 - round(0.3 * 48) - 24, 24]
    assert frame["protected"].tolist() == [False, True]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="not a pruning plan"):
        PruningPlan.load(tmp_path / "bad.json")


def test_a_pruned_model_is_pruned_and_scanned_again(tmp_path):
    model = tiny("qwen2")
    once = prune(model, plan_pruning(model, ratio=0.3, method="magnitude"))
    twice = prune(once, plan_pruning(once, ratio=0.3, method="random", allocation="global"))
    save_pruned(twice, None, tmp_path / "t", format="masked")
    assert torch.allclose(logits(load_pruned(tmp_path / "t")), logits(twice), atol=1e-6)
    save_pruned(twice, tiny_tokenizer(), tmp_path / "p")
    again = load_pruned(tmp_path / "p")
    assert len(again.llmbrain_pruning) == 2
    (run,) = scan(again, tiny_tokenizer(), ["abcabc"])
    assert run.space.widths == anatomy(twice).widths


def test_a_plan_of_another_model_is_refused():
    plan = plan_pruning(tiny("llama"), ratio=0.3, method="magnitude")
    with pytest.raises(InputError, match="plan was made for weights"):
        prune(tiny("llama", seed=1), plan)
    with pytest.raises(InputError, match="layers of 2 x 24 neurons, this model has 3 x 24"):
        prune(tiny("llama", num_hidden_layers=3), plan)


def test_weights_that_cannot_be_cut_are_refused_and_untouched():
    model = tiny("llama")
    plan = plan_pruning(model, ratio=0.3, method="magnitude")
    tied = tiny("llama")
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight is tied to model\.layers\.0"):
        plan_pruning(tied, ratio=0.3, method="magnitude")
    quantised = copy.deepcopy(model)
    down = quantised.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="is quantised"):
        plan_pruning(quantised, ratio=0.3, method="magnitude")
    before = weights_digest(anatomy(model))
    wide = tiny("llama", intermediate_size=256)
    wide_plan = plan_pruning(wide, ratio=0.3, method="magnitude")
    with pytest.raises(InputError, match="6 tokens, too few for layers of 256 neurons: at least 64"):
        prune(wide, wide_plan, calibration=IDS[:1, :6], compensate="bias")
    with pytest.raises(InputError, match="needs calibration texts"):
        prune(model, plan, compensate="bias")
    with pytest.raises(InputError, match=r"weights of shape \(40, 16\) do not fit calibration windows \(9, 16\)"):
        prune(model, plan, calibration=windows(9), compensate="bias", weights=torch.ones(40, 16))
    with pytest.raises(InputError, match="weights must be at least 0"):
        plan_pruning(model, ratio=0.3, method="obs", calibration=windows(9), weights=-torch.ones(9, 16))
    assert weights_digest(anatomy(model)) == before


@pytest.mark.parametrize("ratio", [0, 1, -0.1, float("nan"), "half"])
def test_ratios_outside_zero_and_one_are_refused(ratio):
    with pytest.raises(InputError, match="ratio="):
        plan_pruning(tiny("llama"), ratio=ratio, method="magnitude")


def test_unknown_names_are_listed():
    with pytest.raises(InputError, match=r"method='best' is not known.*'flap'"):
        plan_pruning(tiny("llama"), ratio=0.3, method="best")
    with pytest.raises(InputError, match="allocation='fair' is not known"):
        plan_pruning(tiny("llama"), ratio=0.3, method="random", allocation="fair")
    with pytest.raises(InputError, match="protect=5 is not a layer"):
        plan_pruning(tiny("llama"), ratio=0.3, method="random", protect=[5])
    with pytest.raises(InputError, match=r"method='flap'.*needs calibration"):
        plan_pruning(tiny("llama"), ratio=0.3, method="flap")


@pytest.mark.parametrize("method", ["networks", "obs-gradient", "obs", "flap"])
def test_encoders_are_pruned_too(method):
    from transformers import BertModel

    bare = BertModel(tiny("bert").config).eval()
    plan = plan_pruning(bare, ratio=0.3, method=method, calibration=windows())
    small = prune(bare, plan, calibration=windows(), compensate="least-squares")
    assert anatomy(small).widths == plan.widths
    with pytest.raises(InputError, match=r"BertModel predicts no next token, as method='taylor' needs"):
        plan_pruning(bare, ratio=0.3, method="taylor", calibration=windows())


def test_the_metric_of_an_encoder_is_the_curvature_of_its_last_states():
    """Mean of J^T r r^T J over many r against J^T J by autograd, for a single-token text."""
    from transformers import BertModel

    torch.manual_seed(0)
    bert = BertModel(tiny("bert").config).eval()
    layer, ids = anatomy(bert).layers[1], torch.tensor([[5]])
    jacobian = torch.zeros(16, 16)
    caught = []
    handle = layer.down.module.register_forward_hook(lambda m, a, out: caught.append(out))
    states = bert(input_ids=ids).last_hidden_state[0, 0]
    handle.remove()
    for i in range(16):
        jacobian[i] = torch.autograd.grad(states[i], caught[0], retain_graph=True)[0].flatten()
    found = gradient_pass(bert, anatomy(bert), ids.repeat(20000, 1))["metric"][1].float()
    exact = jacobian.T @ jacobian
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_planning_changes_nothing():
    model = tiny("falcon")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for method, allocation in (("obs", "sensitivity"), ("obs-gradient", "global"), ("flap", "clamped")):
        plan_pruning(model, ratio=0.4, method=method, allocation=allocation, calibration=windows())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
