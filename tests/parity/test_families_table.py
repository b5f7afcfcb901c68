"""The table of what is tested of each family, in the guide to checkpoints, is what the tests are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llama.checkpoint.families import FAMILIES
from tests.parity import (
    test_experts,
    test_families,
    test_family_ranks,
    test_layer_families,
    test_lora,
    test_matrix,
    test_other_forms,
    test_relatives,
)

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "checkpoints.md"
MODELS: dict[str, Any] = {**test_relatives.RELATIVES, **test_layer_families.LAYERED, **test_experts.MODELS}
# Tests of one family, whose models are those of another under other names.
RENAMED: dict[str, Callable[..., None]] = {
    "exaone": test_relatives.test_exaone_is_llama_under_other_names,
    "minicpm": test_relatives.test_minicpm_is_granite_with_multipliers_that_follow_from_sizes,
    "telechat3": test_relatives.test_telechat3_is_llama_under_another_name,
}


def parameters(*tests: Callable[..., None]) -> list[str]:
    """Names of the models that tests are given."""
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", ()) if "name" in mark.args[0]]
    return [case if isinstance(case, str) else case[0] for mark in marks for case in mark.args[1]]


def families(names: Iterable[str]) -> Counter[str]:
    return Counter(MODELS[name][0].model_type for name in names)


def of_gguf() -> Counter[str]:
    """Of architectures: a model may be written under the name of another family."""
    found = families(
        parameters(
            test_experts.test_other_families_in_gguf_equal_transformers,
            test_experts.test_llama_4_in_gguf_equals_transformers,
        )
    )
    found["mixtral"] = len(test_experts.test_mixtral_in_gguf_equals_transformers.pytestmark[0].args[1])  # type: ignore[attr-defined]
    for name, (arch, _) in {**test_relatives.GGUFS, **test_layer_families.GGUFS}.items():
        own = MODELS[name][0].model_type
        is_own = arch == (FAMILIES[own].gguf or "llama")
        found[own if is_own else next(key for key, row in FAMILIES.items() if row.gguf == arch)] += 1
    return found


def of_ranks() -> dict[str, str]:
    sizes = {"llama": {size for each in test_matrix.RANKS.values() for size in each}}
    for name, size in test_family_ranks.CASES:
        sizes.setdefault(MODELS[name][0].model_type, set()).add(size)
    return {family: ", ".join(map(str, sorted(found))) for family, found in sizes.items()}


COLUMNS: dict[str, Any] = {
    "folder": families(
        parameters(
            test_relatives.test_logits_equal_transformers,
            test_layer_families.test_logits_equal_transformers,
            test_experts.test_logits_equal_transformers,
        )
    )
    + Counter(RENAMED.keys())
    + Counter(llama=len(test_families.FAMILIES), mistral=len(test_families.MISTRALS)),
    "GGUF": of_gguf() + Counter(llama=len(test_other_forms.BIASES)),
    "blocks": families(parameters(test_relatives.test_blocks_stay_blocks, test_layer_families.test_blocks_stay_blocks))
    + Counter(llama=len(test_other_forms.BIASES)),
    "ranks": of_ranks(),
    "adapters": families(test_lora.FAMILIES) + Counter(llama=len(test_lora.CONFIGS)),
    "to a folder": families(
        parameters(
            test_relatives.test_conversion_writes_a_folder_that_transformers_reads,
            test_layer_families.test_conversion_writes_a_folder_that_transformers_reads,
        )
    ),
    "to GGUF": families([*test_relatives.WRITTEN, *test_layer_families.WRITTEN]),
}


def test_the_guide_says_what_is_tested_of_each_family() -> None:
    """A family could be added without its tests, or a table of tests could stay after these are gone."""
    rows = [["`model_type`", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[f"`{name}`", *(str(column.get(name) or "") for column in COLUMNS.values())] for name in FAMILIES]
    table = "\n".join(f"| {' | '.join(row)} |".replace("  ", " ") for row in rows)
    assert table in GUIDE.read_text(encoding="utf-8"), f"the table is:\n{table}"
    assert all(COLUMNS["folder"][name] for name in FAMILIES)
