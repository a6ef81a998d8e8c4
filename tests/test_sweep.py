"""The sweep: a fixed sample of every kind of model; it tells what is wrong, goes on, and stays in its bounds."""

import csv
import sys

import pytest
import torch
import transformers
from models import built, older_transformers
from torch import nn

from libragrad_minimal import sweep as sweeping
from libragrad_minimal import zoo
from libragrad_minimal.cli import main
from libragrad_minimal.small_configs import SMALL, small_config
from libragrad_minimal.small_timm import MOST_PARAMETERS, smallest, twins, without_sizes
from libragrad_minimal.special_configs import LAYERS, WIDTH
from libragrad_minimal.sweep import (
    COLUMNS,
    Bounds,
    Table,
    judge_attribute,
    judge_engine,
    read,
    summary,
    sweep,
    verdicts,
)
from libragrad_minimal.zoo import Case, build, registered

SAMPLE = {
    "timm": ["test_vit", "vit_tiny_patch16_224", "pit_ti_224", "mixer_s32_224", "test_mambaout", "cait_xxs24_224"],
    "transformers": [
        "decoder llama",
        "decoder gpt2",
        "decoder mamba",
        "decoder zamba",
        "classifier bert",
        "masked albert",
        "encoder-decoder t5",
        "speech whisper",
        "audio wav2vec2",
        "tower dinov2",
        "vision vit",
        "segmentation segformer",
        "pair siglip",
        "vision-language llava",
        "vision-language qwen2_5_vl",
        "vision-language smolvlm",
        "vision-language molmo2",
    ],
    "open_clip": ["ViT-B-32 picture", "ViT-B-32 text"],
    "treated": ["as it is", "checkpointed", "in memory until needed (accelerate)"],
}


@pytest.fixture
def as_swept() -> None:
    """For tests of names that belong to one release."""
    if reason := older_transformers():
        pytest.skip(reason)


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in SAMPLE for name in SAMPLE[library]])
def test_sample(library, name):
    if library == "transformers" and older_transformers():
        built(library, name)
    row = verdicts(library, name)
    assert (row["engine"], row["attribute"]) == ("complete", "complete"), row


def test_models_that_a_package_is_missing_for_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    row = verdicts("treated", "LoRA (peft)")
    assert (row["engine"], "needs a package" in row["engine_detail"]) == ("not built", True)


def test_every_name_of_the_sample_is_registered(as_swept):
    for library, names in SAMPLE.items():
        assert set(names) <= set(registered(library))


def test_special_configurations_are_of_classes_that_there_are(as_swept):
    from transformers import CONFIG_MAPPING

    from libragrad_minimal.special_configs import SPECIAL

    def parts(config_class):
        kinds = {config_class.__name__}
        for part in getattr(config_class, "sub_configs", {}).values():
            kinds |= parts(part)
        return kinds

    known = set().union(*(parts(config_class) for config_class in CONFIG_MAPPING.values()))
    assert {name for name in SPECIAL if name not in known and not hasattr(transformers, name)} == set()


def test_reasons_are_of_models_that_are_registered(as_swept):
    assert set(zoo.WHY_NOT) <= set(registered("transformers"))


def test_special_values_hold_in_parts_too():
    from transformers import DbrxConfig, FastVlmConfig

    assert small_config(DbrxConfig(), pictures=False).attn_config.clip_qkv == 8
    assert small_config(FastVlmConfig(), pictures=True).vision_config.architecture == "fastvit_mci0"


def test_parts_of_a_configuration_keep_what_the_whole_says():
    from transformers import DetrConfig, RTDetrConfig

    for config in (DetrConfig(), RTDetrConfig()):
        small = small_config(config, pictures=False)
        assert (small.d_model, small.encoder_layers) == (WIDTH, LAYERS)
        said, kept = config.backbone_config, small.backbone_config
        assert kept.model_type == said.model_type
        assert len(said.out_indices) == 1 or kept.out_indices == said.out_indices
        assert getattr(kept, "backbone", None) == getattr(said, "backbone", None)


def test_filled_configurations_have_less_of_none():
    from transformers import GPT2Config

    assert GPT2Config().n_inner is None
    assert small_config(GPT2Config(), pictures=False).n_inner is None
    assert small_config(GPT2Config(), pictures=False, filled=True).n_inner == SMALL["n_inner"]


# ---- models that are one but for their sizes ------------------------------------------------------------------------


def test_twins_differ_in_sizes_alone():
    ours = "vit_tiny_patch16_224"
    others = ["vit_large_patch32_384", "vit_base_patch16_224"]
    assert twins([ours, *others]) == dict.fromkeys(others, ours)
    assert twins([ours, "vit_tiny_r_s16_p8_224", "test_vit2", "deit_tiny_distilled_patch16_224", "mixer_b16_224"]) == {}


@pytest.mark.parametrize(
    ("one", "other"), [(0, 1), (1, 2), (True, False), (None, 1), ("s1", "t1"), ((1, 0), (1, 1)), ({"a": 1}, {"b": 1})]
)
def test_switches_are_no_sizes(one, other):
    assert without_sizes(one) != without_sizes(other)
    assert without_sizes({"x": [one, 7]}) != without_sizes({"x": [other, 7]})


def test_asking_leaves_timm_as_it_was():
    import timm

    twins(["vit_tiny_patch16_224"])
    assert timm.create_model("test_vit").num_classes == 1000


def test_models_too_large_are_narrowed():
    with torch.device("meta"):
        model = smallest("mobilenetv5_300m_enc")
    assert sum(parameter.numel() for parameter in model.parameters()) < MOST_PARAMETERS


def test_one_of_several_sizes_is_judged(tmp_path):
    path = tmp_path / "table.csv"
    sweep("timm", ["test_vit", "vit_tiny_patch16_224", "vit_small_patch16_224"], path)
    _, first, second = read(path)
    assert first["attribute"] == "complete"
    assert (second["attribute"], second["engine_detail"]) == ("", "is vit_tiny_patch16_224 but for its sizes")


def test_a_size_that_is_too_large_does_not_speak_for_the_others(tmp_path):
    path = tmp_path / "table.csv"
    sweep("timm", ["volo_d5_224", "volo_d1_224"], path)
    first, second = read(path)
    assert first["engine_detail"] == "has 294 million parameters"
    assert (second["engine"], second["attribute"]) == ("complete", "complete")


# ---- does it find what is wrong? -------------------------------------------------------------------------------------


@pytest.fixture
def small_vit():
    return build("timm", "test_vit")


def test_engine_that_misses_constants_is_wrong(small_vit, monkeypatch):
    monkeypatch.setattr(sweeping, "additive_constants", lambda output, inputs: ())
    assert judge_engine(small_vit, [])[""] == "wrong"


def altered(monkeypatch, **changes):
    original = sweeping.attribute

    def attribute(*args, **kwargs):
        result = original(*args, **kwargs)
        return sweeping.replace(result, **{name: change(getattr(result, name)) for name, change in changes.items()})

    monkeypatch.setattr(sweeping, "attribute", attribute)


@pytest.mark.parametrize(
    "changes",
    [
        {"completeness_error": lambda error: error + 1},
        {"scores": lambda scores: scores * torch.nan},
        {"output": lambda output: output + 1},
    ],
    ids=["incomplete", "not finite", "another number"],
)
def test_attribution_that_is_wrong(small_vit, monkeypatch, changes):
    number = []
    judge_engine(small_vit, number)
    assert judge_attribute(small_vit, number)[""] == "complete"
    altered(monkeypatch, **changes)
    assert judge_attribute(small_vit, number)[""] == "wrong"


def test_attribution_that_rounds_isnt_wrong(small_vit, monkeypatch):
    weight = next(small_vit.model.parameters())
    altered(monkeypatch, completeness_error=lambda error: error + (weight.dtype == torch.float32))
    assert judge_attribute(small_vit, [])[""] == "complete"
    assert weight.dtype == torch.float32


def test_map_that_lies_wrong(small_vit, monkeypatch):
    original = sweeping.layout_of

    def mirrored(*args):
        layout = original(*args)
        return sweeping.replace(layout, place=layout.place.flip(0))

    assert sweeping.misplaced(small_vit) == ""
    monkeypatch.setattr(sweeping, "layout_of", mirrored)
    assert "changing cell" in sweeping.misplaced(small_vit)


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)])

    def forward(self, x):
        raise IndexError("from deep inside")


def test_raw_exceptions_are_no_refusals(monkeypatch):
    monkeypatch.setattr(sweeping, "build", lambda library, name: Case("odd", Raises().eval(), torch.randn(1, 3, 8)))
    row = verdicts("timm", "odd")
    assert (row["engine"], row["attribute"]) == ("raw exception", "raw exception")
    assert "from deep inside" in row["attribute_detail"]


def test_refusals_say_why(monkeypatch):
    case = Case("odd", nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(1, 8))
    monkeypatch.setattr(sweeping, "build", lambda library, name: case)
    row = verdicts("timm", "odd")
    assert (row["engine"], row["attribute"]) == ("complete", "refused")
    assert "has no list of blocks" in row["attribute_detail"]


# ---- the table -------------------------------------------------------------------------------------------------------


def test_goes_on_where_it_was(tmp_path):
    path = tmp_path / "table.csv"
    sweep("timm", ["test_vit"], path)
    (first,) = read(path)
    assert (first["model"], first["engine"], first["attribute"], first["torch"]) == (
        *("test_vit", "complete", "complete"),
        torch.__version__,
    )
    with path.open("a") as file:
        file.write("test_vit2,atten")  # killed within a row
    sweep("timm", ["test_vit", "test_vit2"], path)
    rows = read(path)
    assert [row["model"] for row in rows] == ["test_vit", "test_vit2"]
    assert rows[0] == first


@pytest.mark.parametrize("content", [b"my,notes\n1,2\n", b"\xff\xd8\xff\xe0 a photograph", b"half a line of mine"])
def test_what_is_no_table_of_a_sweep_is_left_as_it_is(content, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(FileExistsError, match="is no table of a sweep: choose another name"):
        sweep("timm", ["test_vit"], path)
    assert path.read_bytes() == content


def test_what_was_found_with_other_versions_is_found_anew(tmp_path):
    path = tmp_path / "table.csv"
    Table(path, "timm").add({"model": "test_vit"})
    assert set(Table(path, "timm").done) == {"test_vit"}
    text = path.read_text().replace("timm ", "timm 0.")
    path.write_text(text)
    assert Table(path, "timm").done == {}


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [(Bounds(seconds=0), "took more than 0 s"), (Bounds(gigabytes=0.01), "needs more than 0.01 GB")],
    ids=["time", "memory"],
)
def test_bounds(tmp_path, bounds, reason):
    path = tmp_path / "table.csv"
    sweep("timm", ["vit_tiny_patch16_224"], path, bounds=bounds)
    (row,) = read(path)
    assert (row["engine"], row["engine_detail"]) == ("not run", reason)


def test_models_that_mix_nothing_are_not_asked():
    assert zoo.NOTHING_MIXED in verdicts("timm", "test_resnet")["engine_detail"]


def test_summary():
    rows = [dict.fromkeys(COLUMNS, "") | {"kind": kind} for kind in ("a", "a", "b", "b")]
    for row, engine, attribute in zip(
        rows, ("complete", "complete", "complete", "not built"), ("complete", "refused", "wrong", ""), strict=True
    ):
        row.update(engine=engine, attribute=attribute)
    assert summary(rows).splitlines()[-1].split() == ["all", "3", "3", "1", "(33%)", "1", "0", "0", "1"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    assert main(["sweep", "timm", "--pattern", "test_vit", "-o", str(tmp_path)]) == 0
    with (tmp_path / "sweep_timm.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["test_vit"]
    assert "attribute complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pattern", "nothing*"], "no model that matches"),
        (["-o", "/proc/no/table.csv"], "can't write /proc/no/table.csv"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    assert main(["sweep", "timm", *arguments]) == 2
    assert said in capsys.readouterr().err
