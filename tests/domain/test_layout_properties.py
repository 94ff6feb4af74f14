"""What holds for every layout, whatever a job contains."""

from __future__ import annotations

from typing import Literal

from hypothesis import example, given
from hypothesis import strategies as st

from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.layout import Layout, plan_layout
from ncr_upload.domain.packages import SourceFile
from ncr_upload.domain.paths import find_segment_problem, fold

SKU = "VASE-1001"
IDS = ["1f0e8a6c-93b1-4d62-8a55-0c3f7b9d2e41", "7B2D4C9E-0A1B-4C3D-9E8F-112233445566"]
FOLDERS = [
    *("GLB_files", "glb_FILES", "old_GLB_files_backup", "Materials", "material", "sources", "SOURCES", "Textures", "textures"),
    *(SKU, SKU.lower(), "gltf", "FBX", "caf\u00e9", "cafe\u0301", ".."),
]
NAMES = [
    *("mesh.glb", "MESH.GLB", f"{SKU}.glb", f"{IDS[0]}.glb", f"oak_{IDS[1]}.GLB", f"{IDS[0]}_{IDS[1]}.glb"),
    *(
        "vase.blend",
        "vase.fbx",
        "vase.gltf",
        "vase.bin",
        "wood.png",
        "Wood.PNG",
        f"{IDS[0]}_color.png",
        "sources",
        "notes.txt",
        "",
    ),
]
STAMPS = ["2026-11-20 10:00:00", "2026-11-20 10:00:00.5", "2026-11-21T09:00:00", "0000-00-00 00:00:00", ""]

likely_keys = st.builds(
    lambda folders, name: "/".join([*folders, name]), st.lists(st.sampled_from(FOLDERS), max_size=3), st.sampled_from(NAMES)
)
harmless_keys = st.builds(
    lambda folder, number, name: f"{folder}/{number}_{name}",
    st.sampled_from(["a", "Textures", "Materials/x", "sources", "u/gltf"]),
    st.integers(0, 9),
    st.sampled_from(["wood.png", "vase.fbx", "notes.txt", f"{IDS[0]}.png"]),
)
keys = st.one_of(likely_keys, harmless_keys, st.text(max_size=30))
jobs = st.lists(st.builds(SourceFile, keys, st.sampled_from(STAMPS)), min_size=1, max_size=8)
calm_jobs = st.lists(st.builds(SourceFile, harmless_keys, st.sampled_from(STAMPS)), min_size=1, max_size=8)
any_job = st.one_of(jobs, calm_jobs)
skus = st.one_of(st.just(SKU), st.sampled_from(IDS))
settings = st.sampled_from(["refuse", "newest"])


def plan(files: list[SourceFile], sku: str, collisions: Literal["refuse", "newest"]) -> Layout | str:
    """The plan, or the refusal in words."""
    try:
        return plan_layout(files, sku, collisions)
    except Rejected as refused:
        return str(refused)


@given(any_job, skus, settings, st.randoms(use_true_random=False))
def test_the_order_of_the_files_changes_nothing(files, sku, collisions, random) -> None:
    shuffled = list(files)
    random.shuffle(shuffled)
    assert plan(files, sku, collisions) == plan(shuffled, sku, collisions)


@given(any_job, skus)
@example([SourceFile("a/x.png", ""), SourceFile("b/x.png", "")], SKU)
def test_every_key_has_its_own_place_or_the_job_is_refused(files, sku) -> None:
    layout = plan(files, sku, "refuse")
    if isinstance(layout, Layout):
        assert sorted(file.key for file in layout.files) == sorted({file.key for file in files})


@given(any_job, skus, settings)
def test_no_two_sources_share_a_target_on_any_disk(files, sku, collisions) -> None:
    layout = plan(files, sku, collisions)
    if isinstance(layout, Layout):
        folded = [fold(file.target) for file in layout.files]
        assert len(set(folded)) == len(folded)
        folders = {target.rsplit("/", depth)[0] for target in folded for depth in range(1, target.count("/") + 1)}
        assert not folders & set(folded)


@given(any_job, skus, settings)
def test_every_target_is_a_safe_path_inside_the_skus_folder(files, sku, collisions) -> None:
    layout = plan(files, sku, collisions)
    if isinstance(layout, Layout):
        for file in layout.files:
            first, *rest = file.target.split("/")
            assert first == sku
            assert rest
            assert all(find_segment_problem(segment) is None for segment in rest)


@given(any_job, skus)
def test_a_file_that_loses_to_a_newer_one_is_named_in_the_notes(files, sku) -> None:
    layout = plan(files, sku, "newest")
    if isinstance(layout, Layout):
        kept = {file.key for file in layout.files}
        lost = {file.key for file in files} - kept
        assert all(any(repr(key) in note for note in layout.notes) for key in lost)


@given(any_job, skus)
def test_letting_the_newest_win_changes_no_plan_without_collisions(files, sku) -> None:
    layout = plan(files, sku, "refuse")
    if isinstance(layout, Layout):
        assert plan(files, sku, "newest") == layout
