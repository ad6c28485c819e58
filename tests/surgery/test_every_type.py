"""Every decoder-only model type: three different cuts of each are proved, and what is not cut is refused by name.

Of each type, one of the three is also decoded with a cache and loaded in a fresh process; types whose layers are all
alike are cut in that way alone. With EVERY_CUT=1 in the environment all types are cut, decoded for 64 tokens and loaded
in all three ways, which takes ten minutes (docs/surgery.md has what came out).
"""

import os
import re
from pathlib import Path

import pytest
import transformers
from packaging import version

from depthscope.console.quiet import quiet
from depthscope.errors import SurgeryError
from depthscope.surgery import original_layers
from depthscope.surgery.cutting import cut_out, find_layers
from depthscope.surgery.proof import NEW_TOKENS, proof_ids, prove_decoding
from depthscope.surgery.save import prove_saved
from depthscope.surgery.structure import facts_of
from zoo import NO_PLAIN_STACK, NOT_BUILT, NOT_CAUSAL, decoder_only_types, tiny_model

CURRENT = version.parse(transformers.__version__) >= version.parse("5.23")
TYPES = sorted(set(decoder_only_types()) - set(NOT_BUILT) - set(NO_PLAIN_STACK) - set(NOT_CAUSAL))
WANTED = 3
KEPT = [
    (0, 3),
    (1, 2),
    (0, 1, 3),
    (1, 3),
    (0, 2, 3),
    (2, 3),
    (0, 1),
    (1, 2, 3),
    (0, 2),
]  # of four layers, in this order
EVERY = bool(os.environ.get("EVERY_CUT"))
TOLERANCE = 1e-5

# Types of which no three of these cuts can be had, with what the refusals name; for the others see FEWER.
REFUSED = {
    "beam": "residual_add_idx",
    "inkling2_text": "n_layers_per_attn_res_block|is_block_boundary|attention_input",
    "rwkv": "rescale_every",
}
# Types that cannot be cut in every way, with what the refusals name.
FEWER = {
    "gemma3n_text": "store_full_length_kv|num_kv_shared_layers|layer types",
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), "layer_types"),
    "hy_v4": "indexer_types",
    "jamba": "attn_layer_period",
    **dict.fromkeys(("lfm3", "minimax", "nemotron_h", "recurrent_gemma"), "layer_types"),
    "modernbert-decoder": "attn_norm",
    "zamba": "layers_block_type",
}
# Loaded otherwise than they were saved, whole as well as cut.
NOT_RELOADED = {"zaya": "balancing_biases"}
# They do not decode with a cache as without, whole as well as cut.
NOT_DECODED = {"moshi", "xlstm"}

pytestmark = pytest.mark.skipif(not CURRENT, reason="earlier versions of transformers build some types differently")


def test_all_but_a_few_types_are_cut_in_three_ways_and_the_documentation_names_the_others() -> None:
    cut = set(TYPES) - set(REFUSED) - set(NOT_RELOADED)
    assert len(cut) >= 140
    documented = (Path(__file__).parents[2] / "docs" / "surgery.md").read_text()
    assert f"**{len(cut)} types in three ways" in documented
    for model_type in (*REFUSED, *FEWER, *NOT_RELOADED, *NOT_DECODED):
        assert f"`{model_type}`" in documented


def test_a_model_of_any_type_is_cut_three_ways_or_refused_by_name(tmp_path: Path) -> None:
    saved, problems = [], []
    for number, model_type in enumerate(TYPES):
        model = tiny_model(model_type)
        stack = find_layers(model)
        proved = 0
        ways = KEPT
        if not EVERY and len({str(facts_of(layer)) for layer in stack.layers}) == 1:
            ways, proved = KEPT[number % WANTED :], WANTED - 1
        for kept in ways:
            if proved == WANTED:
                break
            whole = EVERY or ways is not KEPT or proved == number % WANTED
            try:
                small = cut_out(stack, kept)
                if whole:
                    with quiet():
                        _, notes = prove_decoding(model, small, NEW_TOKENS if EVERY else 4)
                    assert bool(notes) == (model_type in NOT_DECODED), (model_type, kept, notes)
            except SurgeryError as error:
                if not _is_named(model_type, str(error)):
                    problems.append((model_type, kept, str(error)))
                continue
            proved += 1
            assert type(small) is type(model)
            assert original_layers(small.config) == kept
            if whole:
                folder = tmp_path / f"{model_type}-{kept}"
                with quiet():
                    small.save_pretrained(folder)
                saved.append((model_type, (small, folder, proof_ids(small), TOLERANCE)))
        if (proved == WANTED) == (model_type in REFUSED):
            problems.append((model_type, proved, "cuts"))
    for (model_type, _), found in zip(saved, prove_saved(each for _, each in saved), strict=True):
        expected = NOT_RELOADED.get(model_type)
        if isinstance(found, str) and not (expected and expected in found):
            problems.append((model_type, "reloaded", found))
    assert not problems, "\n".join(map(str, problems))


def _is_named(model_type: str, message: str) -> bool:
    """Whether a refusal of this type was to be expected, and names what stands against the cut."""
    expected = REFUSED.get(model_type) or FEWER.get(model_type)
    return expected is not None and re.search(expected, message) is not None
