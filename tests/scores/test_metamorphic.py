"""What must hold whatever the numbers are: identities, equal layers, scalings, batch sizes, repeated runs."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from depthscope import Blocks, LayerReport, LayerStack, Settings, analyze
from depthscope.callbacks import EffectivenessCallback
from depthscope.errors import SettingsError
from depthscope.layers.stack import Capture
from depthscope.scores import usefulness
from models import WIDTH, AffineLayer, make_identity, random_blocks, tiny_llama, token_first_llama
from zoo import tiny_model

FIT, EVAL, LENGTH = 6, 4, 24
BLOCKS = random_blocks(FIT + EVAL, LENGTH)


def measure(model: torch.nn.Module, blocks: torch.Tensor | Blocks = BLOCKS, **options: object) -> LayerReport:
    return analyze(model, blocks=blocks, **{"fit_blocks": FIT, "eval_blocks": EVAL, **options})


def assert_equal_scores(one: LayerReport, other: LayerReport, tolerance: float) -> None:
    def numbers(report: LayerReport) -> list[float | None]:
        rows = [value for row in report.layers for value in row.values() if not isinstance(value, str)]
        cells = [cell for matrix in report.pairs.values() for row in matrix for cell in row]
        return [*report.scores.values(), *rows, *cells]

    pairs = list(zip(numbers(one), numbers(other), strict=True))
    assert pairs
    for a, b in pairs:
        if a is None or b is None:
            assert a is b
        else:
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def test_swapping_two_equal_layers_changes_nothing() -> None:
    model = tiny_llama()
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())
    report = measure(model)
    assert report.pairs["permutation"][1][2] == pytest.approx(0, abs=1e-7)
    assert report.pairs["permutation"][0][3] > 1e-4


def test_an_identity_layer_contributes_nothing() -> None:
    model = tiny_llama()
    make_identity(model.model.layers[2])
    report = measure(model, probes="exact")
    row = report.layers[2]
    assert row["usefulness_ratio"] == pytest.approx(1, abs=1e-9)
    assert row["skip_ratio"] == pytest.approx(1, abs=1e-9)
    for name in ("causal", "block_influence", "angular_distance", "update_norm", "jacobian", "variance_update"):
        assert row[name] == pytest.approx(0, abs=1e-9), name
    assert report.layers[1]["causal"] > 1e-3
    assert report.layers[1]["usefulness_ratio"] != pytest.approx(1, abs=1e-4)


def test_a_layer_that_is_affine_has_ratio_one() -> None:
    model = tiny_llama()
    torch.manual_seed(3)
    model.model.layers[1] = AffineLayer(WIDTH)
    row = measure(model).layers[1]
    assert row["usefulness_ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(row["skip_ratio"] - 1) > 1e-4


def test_scaling_an_affine_layers_map_scales_its_jacobian_distance() -> None:
    model = tiny_llama()
    torch.manual_seed(3)
    model.model.layers[1] = AffineLayer(WIDTH)
    once = measure(model, scores="jacobian", probes="exact").layers[1]["jacobian"]
    with torch.no_grad():
        model.model.layers[1].linear.weight *= 3
    assert measure(model, scores="jacobian", probes="exact").layers[1]["jacobian"] == pytest.approx(3 * once, rel=1e-5)


def test_scaling_the_whole_stream_scales_variance_and_leaves_directions() -> None:
    # Everything written to the stream grows 8 times; the norms in front of each sublayer take it back (eps is tiny).
    model = tiny_llama(rms_norm_eps=1e-12)
    larger = copy.deepcopy(model)
    with torch.no_grad():
        larger.model.embed_tokens.weight *= 8
        for layer in larger.model.layers:
            layer.self_attn.o_proj.weight *= 8
            layer.mlp.down_proj.weight *= 8
    one, other = measure(model, probes="exact"), measure(larger, probes="exact")
    for before, after in zip(one.layers, other.layers, strict=True):
        for name in ("variance", "variance_update", "attention_variance", "mlp_variance"):
            assert after[name] == pytest.approx(64 * before[name], rel=1e-4)
        for name in ("usefulness_ratio", "skip_ratio", "causal", "permutation", "jacobian", "block_influence"):
            assert after[name] == (before[name] and pytest.approx(before[name], rel=1e-4, abs=1e-6)), name


def test_a_report_does_not_depend_on_the_batch_size() -> None:
    model = tiny_llama()
    one = measure(model, batch_size=1)
    for size in (2, 3, 4):
        assert_equal_scores(one, measure(model, batch_size=size), 1e-5)


def test_a_sampled_report_does_not_depend_on_the_batch_size() -> None:
    model = tiny_llama(num_layers=6)
    one = measure(model, batch_size=1, scores="permutation", pairs=0.5)
    assert_equal_scores(one, measure(model, batch_size=3, scores="permutation", pairs=0.5), 1e-5)


def test_the_same_input_gives_the_same_bytes() -> None:
    reports = [measure(tiny_llama()).model_dump(exclude={"created"}) for _ in range(2)]
    assert repr(reports[0]) == repr(reports[1])


def test_scores_do_not_depend_on_which_others_are_chosen() -> None:
    model = tiny_llama()
    whole = measure(model)
    for name in whole.settings["scores"]:
        alone = measure(model, scores=name)
        for key, value in alone.scores.items():
            assert value == pytest.approx(whole.scores[key], rel=1e-6, abs=1e-9), key


def test_the_growth_of_variance_is_its_split() -> None:
    for row in measure(tiny_llama()).layers:
        parts = row["variance_input"] + row["variance_update"] + row["variance_covariance"]
        assert row["variance"] == pytest.approx(parts, rel=1e-5)


def test_more_blocks_lower_the_standard_error() -> None:
    blocks = random_blocks(70, LENGTH)
    few = analyze(tiny_llama(), blocks=blocks, fit_blocks=6, eval_blocks=4, scores="skip")
    many = analyze(tiny_llama(), blocks=blocks, fit_blocks=6, eval_blocks=64, scores="skip")
    assert many.scores["loss_se"] < few.scores["loss_se"]
    assert many.scores["skip_ratio_se"] < few.scores["skip_ratio_se"]


def test_padding_and_leading_special_tokens_do_not_count() -> None:
    model = tiny_llama()
    plain = measure(model)
    # Padding on the right changes no earlier token of a causal model; its own tokens must not be counted.
    padded = torch.cat([BLOCKS, torch.zeros(len(BLOCKS), 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(BLOCKS), torch.zeros(len(BLOCKS), 5, dtype=torch.long)], 1)
    with_padding = measure(model, Blocks.from_ids(padded, mask))
    assert with_padding.data["tokens"] == plain.data["tokens"]
    assert_equal_scores(plain, with_padding, 1e-4)
    started = Blocks.from_ids(torch.cat([torch.ones(len(BLOCKS), 1, dtype=torch.long), BLOCKS], 1), special_ids={1})
    assert measure(model, started).data["tokens"] == plain.data["tokens"]


def test_permutation_sampled_agrees_with_all_pairs_within_its_error() -> None:
    model, blocks = tiny_llama(num_layers=8), random_blocks(22, LENGTH)
    options = {"blocks": blocks, "fit_blocks": 6, "eval_blocks": 16, "scores": "permutation"}
    exact = analyze(model, **options).scores["permutation"]
    sampled = [analyze(model, **options, pairs=0.25, seed=seed).scores for seed in range(8)]
    for scores in sampled:
        assert scores["permutation_sampling_se"] > 0
        assert abs(scores["permutation"] - exact) < 4 * scores["permutation_sampling_se"]


def jacobian(model: torch.nn.Module, probes: int | str, seed: int = 0, blocks: int = 8) -> LayerReport:
    text = random_blocks(blocks, 64)
    settings = {"fit_blocks": 0, "eval_blocks": blocks, "scores": "jacobian", "probes": probes, "seed": seed}
    return analyze(model, blocks=text, **settings)


def relative(report: LayerReport, exact: LayerReport, name: str = "jacobian") -> np.ndarray:
    return np.array(report.column(name)) / np.array(exact.column("jacobian"))


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_as_many_probes_as_features_are_exact(blocks: int) -> None:
    exact, probed = (jacobian(tiny_llama(), probes, blocks=blocks) for probes in ("exact", 40))
    np.testing.assert_allclose(relative(probed, exact), 1, rtol=1e-5)
    assert "jacobian_probe_se" not in exact.scores
    assert probed.scores["jacobian_probe_se"] == 0
    assert probed.scores["jacobian_se"] == (pytest.approx(exact.scores["jacobian_se"]) if blocks > 1 else None)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "mixtral", "qwen2"])
def test_the_default_probes_are_off_by_little_in_small_models(model_type: str) -> None:
    model = tiny_model(model_type, num_layers=2)
    exact = jacobian(model, "exact")
    errors = [relative(jacobian(model, 16, seed), exact) - 1 for seed in range(3)]
    assert np.sqrt(np.square(errors).mean()) < 0.03  # 16 random signs on all blocks: 3.5 to 5.7%


def test_the_error_of_a_layer_has_that_of_its_probes() -> None:
    model = tiny_llama(num_layers=2, hidden_size=64, intermediate_size=128)
    exact = jacobian(model, "exact")
    block_error = relative(exact, exact, "jacobian_se")
    for seed in range(4):
        probed = jacobian(model, 2, seed)  # 8 vectors of 64
        error = relative(probed, exact, "jacobian_se")
        assert (np.abs(relative(probed, exact) - 1) < 4 * np.hypot(error, block_error)).all()
        assert error.mean() > 1.5 * block_error.mean()
        assert probed.scores["jacobian_probe_se"] > 0


def test_a_layer_that_does_nothing_has_a_distance_of_zero_and_an_error() -> None:
    model = tiny_llama()
    make_identity(model.model.layers[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = measure(model, scores="jacobian", probes=2)
    assert report.layers[2]["jacobian"] == pytest.approx(0, abs=1e-6)
    assert report.layers[2]["jacobian_se"] == pytest.approx(0, abs=1e-6)
    assert report.layers[1]["jacobian_se"] > 1e-4
    assert report.scores["jacobian_probe_se"] > 1e-5


def test_adjacent_pairs_leave_the_others_empty() -> None:
    pairs = measure(tiny_llama(), pairs="adjacent", scores="permutation").pairs["permutation"]
    assert [[cell is not None for cell in row] for row in pairs] == [
        [abs(i - j) == 1 for j in range(4)] for i in range(4)
    ]


def test_the_papers_code_gives_other_ratios_and_says_so() -> None:
    model = tiny_llama()
    right, released = measure(model), measure(model, paper_code=True)
    assert released.settings["in_sample"]
    assert any("un-transposed" in note for note in released.notes)
    assert released.scores["usefulness_ratio"] > right.scores["usefulness_ratio"] + 0.01
    assert released.scores["causal"] == right.scores["causal"]


def test_what_one_setting_implies_goes_when_it_goes() -> None:
    implied = Settings(paper_code=True)
    assert implied.fits_in_sample
    assert implied.to_dict()["in_sample"]
    for taken_back in (implied.with_(paper_code=False), replace(implied, paper_code=False)):
        assert not taken_back.fits_in_sample
        assert taken_back == Settings()
    assert Settings(paper_code=True, in_sample=True).with_(paper_code=False).fits_in_sample
    with pytest.raises(SettingsError, match="fit_blocks"):
        Settings(paper_code=True, fit_blocks=0).with_(paper_code=False)
    kept = EffectivenessCallback(BLOCKS, paper_code=True).state()["args"]
    assert not EffectivenessCallback(**{**kept, "paper_code": False}).settings.fits_in_sample


@pytest.mark.parametrize("silent", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_sublayer_that_returns_zeros_has_variance_zero(silent: str) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].get_submodule(silent).weight.zero_()
    model.model.layers[2] = AffineLayer(WIDTH)  # has neither
    rows = measure(model, scores="variance", fit_blocks=0).layers
    name, other = ("attention_variance", "mlp_variance") if "attn" in silent else ("mlp_variance", "attention_variance")
    assert rows[1][name] == 0
    assert rows[1][other] > 0
    assert rows[2][name] is None


@pytest.mark.parametrize("length", [EVAL, 12])  # as many tokens as blocks, and more
def test_a_stream_with_its_tokens_first_gives_the_same_scores(length: int) -> None:
    mask = torch.ones(FIT + EVAL, length, dtype=torch.bool)
    mask[::2, length - 2 :] = False
    blocks = Blocks(random_blocks(FIT + EVAL, length), attention_mask=mask)
    scores = "variance,block_influence,skip,causal,jacobian,attention_sparsity"
    one, other = (measure(build(), blocks, scores=scores, probes=4) for build in (tiny_llama, token_first_llama))
    assert_equal_scores(one, other.model_copy(update={"layers": _with_kinds_of(one, other)}), 1e-5)


def _with_kinds_of(one: LayerReport, other: LayerReport) -> list[dict[str, object]]:
    return [{**row, "kind": its["kind"]} for row, its in zip(other.layers, one.layers, strict=True)]


def test_a_fit_in_several_passes_keeps_only_the_layers_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(tiny_llama(), scores="usefulness")
    kept: list[tuple[set[int], set[int]]] = []
    original = LayerStack.capture

    @contextmanager
    def spied(self: LayerStack, **options: object) -> Iterator[Capture]:
        with original(self, **options) as capture:
            yield capture
        kept.append((set(capture.resid_pre), set(capture.resid_post)))

    monkeypatch.setattr(LayerStack, "capture", spied)
    monkeypatch.setattr(usefulness, "ACCUMULATOR_BYTES", 2 * 16 * WIDTH**2)  # two layers at once
    in_parts = measure(tiny_llama(), scores="usefulness")
    assert ({0, 1}, {0, 1}) in kept
    assert ({2, 3}, {2, 3}) in kept
    assert_equal_scores(whole, in_parts, 1e-9)


def test_the_threshold_moves_usefulness_but_no_ratio() -> None:
    model = tiny_llama()
    ratios = [row["usefulness_ratio"] for row in measure(model).layers]
    between = sorted(ratios)[1] + 1e-9
    report = measure(model, threshold=between)
    assert report.scores["usefulness"] == pytest.approx(sum(ratio > between for ratio in ratios) / len(ratios))
    assert [row["usefulness_ratio"] for row in report.layers] == ratios


def test_effective_depth_is_the_participation_ratio() -> None:
    report = measure(tiny_llama())
    increases = [max(row["skip_ratio"] - 1, 0) for row in report.layers]
    expected = sum(increases) ** 2 / sum(increase**2 for increase in increases)
    assert report.scores["effective_depth_skip"] == pytest.approx(expected)
    assert Settings(scores="effective_depth").scores == ("skip", "usefulness")
