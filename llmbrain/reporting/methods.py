"""Methods text and references, made of what was really done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmbrain.page.text import number, short_name
from llmbrain.reporting.contents import Contents, first

REFERENCES = {
    "pruning": (
        "Liu Y, Ning J, Xia S, Gao X, Qiang N, Ge B, Han J, Hu X (2025a). Pruning Large Language Models by Identifying "
        "and Preserving Functional Networks. arXiv:2508.05239."
    ),
    "networks": (
        "Liu Y, Gao X, Sun H, Ge B, Liu T, Han J, Hu X (2025b). Brain-Inspired Exploration of Functional Networks and "
        "Key Neurons in Large Language Models. arXiv:2502.20408."
    ),
    "fingerprint": (
        "Liu Y, Ning J, Xia S, Sun H, Yang Y, Chi H, Gao X, Qiang N, Ge B, Han J, et al. (2026). FNF: Functional "
        "Network Fingerprint for Large Language Models. arXiv:2601.22692."
    ),
    "fastica": (
        "Hyvärinen A (1999). Fast and robust fixed-point algorithms for independent component analysis. IEEE "
        "Transactions on Neural Networks 10(3): 626-634."
    ),
    "melodic": (
        "Beckmann CF, Smith SM (2004). Probabilistic independent component analysis for functional magnetic resonance "
        "imaging. IEEE Transactions on Medical Imaging 23(2): 137-152."
    ),
    "group-ica": (
        "Calhoun VD, Adali T, Pearlson GD, Pekar JJ (2001). A method for making group inferences from functional MRI "
        "data using independent component analysis. Human Brain Mapping 14(3): 140-151."
    ),
    "canica": (
        "Varoquaux G, Sadaghiani S, Pinel P, Kleinschmidt A, Poline JB, Thirion B (2010). A group model for stable "
        "multi-subject ICA on fMRI datasets. NeuroImage 51(1): 288-299."
    ),
    "picard": (
        "Ablin P, Cardoso JF, Gramfort A (2018). Faster independent component analysis by preconditioning with Hessian "
        "approximations. IEEE Transactions on Signal Processing 66(15): 4040-4049."
    ),
    "ulcmod": (
        "Yu et al. (2026). Discovering decoupled functional modules in large language models. AAAI. arXiv:2603.17823."
    ),
    "semi-nmf": (
        "Ding C, Li T, Jordan MI (2010). Convex and semi-nonnegative matrix factorizations. IEEE Transactions on "
        "Pattern Analysis and Machine Intelligence 32(1): 45-55."
    ),
    "icasso": (
        "Himberg J, Hyvärinen A, Esposito F (2004). Validating the independent components of neuroimaging time series "
        "via clustering and visualization. NeuroImage 22(3): 1214-1222."
    ),
    "flap": (
        "An Y, Zhao X, Yu T, Tang M, Wang J (2024). Fluctuation-based Adaptive Structured Pruning for Large Language "
        "Models. AAAI 38(10): 10865-10873. arXiv:2312.11983."
    ),
    "wanda": (
        "Sun M, Liu Z, Bair A, Kolter JZ (2024). A Simple and Effective Pruning Approach for Large Language Models. "
        "ICLR. arXiv:2306.11695."
    ),
    "shortgpt": (
        "Men X, Xu M, Zhang Q, Wang B, Lin H, Lu Y, Han X, Chen W (2024). ShortGPT: Layers in Large Language Models "
        "are More Redundant Than You Expect. arXiv:2403.03853."
    ),
    "2ssp": (
        "Sandri F, Cunegatti E, Iacca G (2025). 2SSP: A Two-Stage Framework for Structured Pruning of LLMs. "
        "Transactions on Machine Learning Research. arXiv:2501.17771."
    ),
    "taylor": (
        "Ma X, Fang G, Wang X (2023). LLM-Pruner: On the Structural Pruning of Large Language Models. NeurIPS. "
        "arXiv:2305.11627."
    ),
    "obs": (
        "Kurtic E, Frantar E, Alistarh D (2023). ZipLM: Inference-Aware Structured Pruning of Language Models. "
        "NeurIPS. arXiv:2302.04089."
    ),
    "surgeon": (
        "van der Ouderaa TFA, Nagel M, van Baalen M, Asano YM, Blankevoort T (2024). The LLM Surgeon. ICLR. "
        "arXiv:2312.17244."
    ),
    "qep": (
        "Arai Y, Ichikawa Y (2025). Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization. "
        "arXiv:2504.09629."
    ),
    "fdr": (
        "Benjamini Y, Hochberg Y (1995). Controlling the false discovery rate: a practical and powerful approach to "
        "multiple testing. Journal of the Royal Statistical Society B 57(1): 289-300."
    ),
}  # fmt: skip

# what in the name of a pruning method, allocation or compensation calls for which paper
_CRITERIA = {
    "published": "pruning", "flap": "flap", "fluctuation": "flap",
    "wanda": "wanda", "taylor": "taylor", "obs": "obs", "surgeon": "surgeon", "gradient": "surgeon",
    "shortgpt": "shortgpt", "2ssp": "2ssp",
}  # fmt: skip


def methods(held: Contents) -> tuple[list[str], list[str]]:
    """Paragraphs of methods text and the references they call for, in order of use.

    Returns
    -------
    paragraphs, references : lists of str
    """
    used: list[str] = []

    def cite(key: str, short: str) -> str:
        if key not in used:
            used.append(key)
        return short

    paragraphs = [
        text for text in (_scan(held), _decomposition(held, cite), _tests(held, cite), _pruning(held, cite)) if text
    ]
    if held.comparison:
        if any("fingerprint" in str(name).lower() for name in held.comparison):
            cite("fingerprint", "")
        paragraphs.append("The tables of the comparison name their own null models and corrections.")
    return paragraphs, [REFERENCES[key] for key in used]


def _scan(held: Contents) -> str:
    if not held.scans:
        return ""
    scans = list(held.scans)
    scan, tokens = scans[0], sum(int(s.n_tokens) for s in scans)
    model = short_name(str(scan.model_id)) if getattr(scan, "model_id", None) else None
    site = getattr(scan, "site", "neuron")
    what = {
        "neuron": "the input of the down projection of each MLP",
        "gate": "the output of each MLP's activation function",
        "up": "the output of each MLP's up projection",
        "mlp_out": "the output of each MLP",
        "block_out": "the residual stream after each block",
        "head": "one signal per attention head",
    }.get(str(site), f"the site {site!r}")
    return (
        f"{f'The language model {model}' if model else 'A language model'} read {number(len(scans))} "
        f"{'text' if len(scans) == 1 else 'texts'} ({number(tokens)} tokens). At every token "
        f"{what} was recorded (site '{site}'; {number(int(scan.n_neurons))} units), one token being one volume."
    )


def _decomposition(held: Contents, cite: Any) -> str:
    if held.networks is None:
        return ""
    ica = held.ica
    parts = []
    params = ica.get_params() if hasattr(ica, "get_params") else {}
    method = str(params.get("method", params.get("algorithm", "fastica"))).lower()
    if ica is not None:
        solver = {
            "fastica": f"FastICA ({cite('fastica', 'Hyvärinen 1999')})" if "fastica" in method else "",
            "picard": f"Picard ({cite('picard', 'Ablin et al. 2018')})" if "picard" in method else "",
        }.get(method, method)
        fun = f", contrast '{params['fun']}'" if params.get("fun") else ""
        iterations = first(ica, "n_iter_")
        counted = f" in {number(iterations)} iterations" if isinstance(iterations, (int, float)) else ""
        converged = first(ica, "converged_")
        state = "" if converged is None else (f"; it converged{counted}" if converged else "; it did NOT converge")
        starts = first(ica, "convergence_") or []
        if len(starts) > 1:
            failed = sum(not start["converged"] for start in starts)
            steps = [int(start["n_iter"]) for start in starts]
            state += f" ({failed} of {len(starts)} starts did not; {min(steps)} to {max(steps)} iterations)"
        seed = f" (seed {params['random_state']})" if params.get("random_state") is not None else ""
        kind = "temporal" if params.get("axis") == "time" else "spatial"
        if params.get("cca") or "cca" in str(params.get("group", "")):
            cite("canica", "")
        modules = getattr(ica, "labels_", None) is not None
        if modules:
            parts.append(
                f"{number(held.n_networks)} modules of neurons were found together with topics of the text by ULCMOD "
                f"({cite('ulcmod', 'Yu et al. 2026')}){seed}{state}. The neurons of a network are those of its module; "
                "a map is their mean activity on its topic, in standard deviations over samples of text."
            )
            return " ".join(parts)
        reduced = (
            f"({cite('group-ica', 'Calhoun et al. 2001')}; {cite('melodic', 'Beckmann and Smith 2004')}): each run was "
            "reduced by principal component analysis over its tokens, the runs were joined, and"
        )
        others = {
            "dictlearning": "by dictionary learning", "kmeans": "by k-means of the neurons",
            "nmf": f"by semi-nonnegative matrix factorization ({cite('semi-nmf', 'Ding et al. 2010')})"
            if method == "nmf" else "",
        }  # fmt: skip
        if method in others:
            parts.append(
                f"Functional networks were found in the subspace that runs have in common {reduced} "
                f"{number(held.n_networks)} maps were found there {others[method]}{seed}{state}."
            )
        else:
            parts.append(
                f"Functional networks were found by {kind} group ICA {reduced} {number(held.n_networks)} independent "
                f"components were estimated with {solver}{fun}{seed}{state}."
            )
    else:
        parts.append(f"{number(held.n_networks)} component maps were used.")
    cutoffs = getattr(held.networks, "cutoffs", None)
    threshold = getattr(held.networks, "threshold", None)
    if cutoffs is not None:
        same = (cutoffs == cutoffs[0]).all() and cutoffs[0, 0] == -cutoffs[0, 1]
        threshold = float(cutoffs[0, 1]) if same else None
    rule = f"|z| > {number(threshold)}" if isinstance(threshold, (int, float)) else "z beyond the network's cut-offs"
    parts.append(
        f"Maps were z-scored over neurons; the key neurons of a network are those with {rule} "
        f"({cite('networks', 'Liu et al. 2025b')})."
    )
    return " ".join(parts)


def _tests(held: Contents, cite: Any) -> str:
    parts = []
    if len(held.effects):
        parts.append(
            "Condition effects are differences of mean activity in standard deviations of the time course; their null "
            "distribution comes from circular shifts of the labels, with the largest value over networks and "
            "conditions taken at each shift (family-wise error)."
        )
    if held.stability is not None:
        parts.append(
            f"The stability of components over repeated estimation is the cluster quality Iq of ICASSO "
            f"({cite('icasso', 'Himberg et al. 2004')})."
        )
    if held.lesion_rows is not None:
        parts.append(
            "Networks were lesioned by replacing their key neurons while the model ran; each effect stands beside that "
            "of random neurons of the same number in the same layers."
        )
        if "q" in held.lesion_rows and held.lesion_rows["q"].notna().any():
            parts.append(
                f"Cells are corrected by the false discovery rate ({cite('fdr', 'Benjamini and Hochberg 1995')})."
            )
    return " ".join(parts)


def _by_networks(used: Mapping[str, Any]) -> str:
    """What networks had to do with the choice of neurons."""
    if not used:
        return ""
    text = (
        f", such that in each layer each of {number(used['n'])} networks keeps at least {used['cover']:g} of the key "
        "neurons that it would keep if neurons went at random"
    )
    if used.get("token_balance"):
        text += (
            f", with tokens weighted by the energy that networks leave unexplained (strength {used['token_balance']:g})"
        )
    return text


def _pruning(held: Contents, cite: Any) -> str:
    plan = held.plan
    if plan is None:
        return ""
    method, ratio = str(getattr(plan, "method", "") or "a stated method"), getattr(plan, "ratio", None)
    allocation = getattr(plan, "allocation", None)
    settings = held.provenance.get("settings") if isinstance(held.provenance, Mapping) else None
    done: Mapping[str, Any] = (held.summary or {}).get("cut") or {}
    repair = str(done.get("compensate") or first(plan, "compensate") or first(settings or {}, "compensate") or "none")
    names = {"pruning": "Liu et al. 2025a", "networks": "Liu et al. 2025b", "flap": "An et al. 2024",
             "wanda": "Sun et al. 2024", "taylor": "Ma et al. 2023", "obs": "Kurtic et al. 2023",
             "surgeon": "van der Ouderaa et al. 2024", "shortgpt": "Men et al. 2024",
             "2ssp": "Sandri et al. 2025"}  # fmt: skip
    keys = list(dict.fromkeys(key for word, key in _CRITERIA.items() if word in method.lower()))
    ours = method == "networks" and not hasattr(plan, "before")  # of experts another criterion has that name
    if method == "networks":
        keys = ["obs", "surgeon"] if ours else ["networks"]
    cited = "; ".join(cite(key, names[key]) for key in keys)
    cited = f"greedy optimal brain surgeon in the metric of the output gradients: {cited}" if ours else cited
    units = "routed experts" if hasattr(plan, "before") else "MLP neurons"
    share = "neurons" if ratio is None else f"{100 * float(ratio):.4g}% of the {units}"
    if any(getattr(plan, "dropped", {}).values()) and ratio is not None:
        share = f"As many parameters as {share} hold"
    text = f"{share[0].upper() + share[1:]} were removed by the criterion '{method}'{f' ({cited})' if cited else ''}"
    text += _by_networks((getattr(plan, "details", None) or {}).get("networks") or {})
    if allocation:
        text += f", spread over layers by the allocation '{allocation}'"
    if repair == "bias":
        text += f"; the mean of what was cut became a bias ({cite('flap', names['flap'])})"
    elif repair == "least-squares":
        text += "; the down projections were refitted by ridge least squares on the calibration text"
        if carried := done.get("propagation"):
            text += (
                f", each to the output of the whole layer and {carried:g} of the error that the layers before it "
                f"left ({cite('qep', 'Arai and Ichikawa 2025')})"
            )
    if read := done.get("calibration"):
        own = f", {number(read['own_windows'])} of which the model wrote itself" if read.get("own_windows") else ""
        text += f". The calibration text was {number(read['windows'])} windows of {number(read['window'])} tokens{own}"
    if protect := getattr(plan, "protect", None):
        text += f". Layers {', '.join(map(str, protect))} (from 0) were left whole"
    return f"{text}. The weight matrices of the pruned model are smaller; none of its weights is merely masked."
