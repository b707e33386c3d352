from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import pytest
from support.recipes import write_recipe

from geosurge.encoder import FusionConfig
from geosurge.errors import ConfigurationError
from geosurge_training.recipe import (
    BlueMarbleData,
    FusionSection,
    H3PartitionSection,
    TableData,
    WebDatasetData,
    load_recipe,
)

TABLE_DATA = 'source = "table"\ntable = "tables/pictures.csv"\nimages = "pictures"'


def edited(folder: Path, *replacements: tuple[str, str], data: str | None = None) -> Path:
    """A valid recipe with some of its text replaced."""
    path = write_recipe(folder / "recipe.toml") if data is None else write_recipe(folder / "recipe.toml", data=data)
    text = path.read_text()
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_the_recipe_of_the_default_bundle_loads() -> None:
    recipe = load_recipe(Path(str(files("geosurge_training") / "recipes" / "blue_marble.toml")))
    assert isinstance(recipe.data, BlueMarbleData)
    assert (recipe.partition.kind, recipe.partition.level_count) == ("s2", 7)
    assert recipe.partition.tau_min_per_level == [16.0] * 7
    assert recipe.training.negatives == "all_cells"


def test_a_recipe_holds_what_its_file_says(tmp_path: Path) -> None:
    recipe = load_recipe(edited(tmp_path, ("tau_min = 8", "tau_min = [8, 4.5]")))
    assert (recipe.name, recipe.seed) == ("tiny-world", 3)
    assert recipe.data == BlueMarbleData(source="blue_marble", partition_samples=4000)
    assert recipe.partition.tau_min_per_level == [8.0, 4.5]
    assert recipe.encoder.vision.backbone == {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    }
    assert recipe.encoder.fusion.config() == FusionConfig(dimension=16, width=16, latent_width=8, heads=2, blocks=2)


def test_each_kind_of_partition_has_keys_of_its_own(tmp_path: Path) -> None:
    hexagons = load_recipe(edited(tmp_path, ("tau_min = 8", 'kind = "h3"\ntau_min = 8\nstart_h3_resolution = 1')))
    assert hexagons.partition == H3PartitionSection(
        kind="h3", tau_min=8, tau_max=[400, 120], start_h3_resolution=1, max_h3_resolution=15
    )
    places = edited(tmp_path, ("tau_min = 8\ntau_max = [400, 120]", 'kind = "administrative"\ntau_min = 8'))
    administrative = load_recipe(places).partition
    assert (administrative.level_count, administrative.tau_min_per_level) == (4, [8.0] * 4)


def test_the_defaults_of_the_fusion_module_are_the_engines() -> None:
    assert FusionSection().model_dump() == asdict(FusionConfig())


def test_relative_paths_start_from_the_recipes_folder(tmp_path: Path) -> None:
    recipe = load_recipe(edited(tmp_path, data=TABLE_DATA))
    assert recipe.data == TableData(
        source="table", table=tmp_path / "tables" / "pictures.csv", images=tmp_path / "pictures"
    )
    whole = load_recipe(edited(tmp_path, data='source = "table"\ntable = "/archive/pictures.csv"'))
    assert isinstance(whole.data, TableData)
    assert (whole.data.table, whole.data.images) == (Path("/archive/pictures.csv"), None)


def test_shards_are_one_pattern_or_several_from_the_recipes_folder(tmp_path: Path) -> None:
    one = load_recipe(edited(tmp_path, data='source = "webdataset"\nshards = "shards/{00..07}.tar"')).data
    assert isinstance(one, WebDatasetData)
    assert one.shard_patterns == [str(tmp_path / "shards/{00..07}.tar")]
    data = 'source = "webdataset"\nshards = ["a/*.tar", "/b.tar"]\ncoordinates = "places.parquet"'
    several = load_recipe(edited(tmp_path, data=data)).data
    assert isinstance(several, WebDatasetData)
    assert several.shard_patterns == [str(tmp_path / "a/*.tar"), "/b.tar"]
    assert several.coordinates == tmp_path / "places.parquet"


def test_shards_and_headings_of_a_wrong_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.shards: "):
        load_recipe(edited(tmp_path, data='source = "webdataset"\nshards = [3]'))
    with pytest.raises(ConfigurationError, match=r"data\.columns: List should have at least 3 items"):
        load_recipe(edited(tmp_path, data=TABLE_DATA + '\ncolumns = ["path"]'))


def test_a_pretrained_backbone_is_a_folder_beside_the_recipe_or_a_hub_id(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml")
    start = path.read_text().index("[encoder.vision.backbone]")
    end = path.read_text().index("[encoder.segmentation]")
    text = path.read_text()
    path.write_text(text[:start] + text[end:])
    path.write_text(path.read_text().replace("frozen = false", 'frozen = false\npretrained = "models/clip"'))
    assert load_recipe(path).encoder.vision.pretrained == "models/clip"
    (tmp_path / "models" / "clip").mkdir(parents=True)
    assert load_recipe(path).encoder.vision.pretrained == str(tmp_path / "models" / "clip")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("seed = 3", "seed = 3\nsede = 4", "sede"),
        ("partition_samples", "partition_sample", "data.partition_sample"),
        ("tau_min = 8", "tau_min = 8\ntau = 9", "partition.tau"),
        ("frozen = false", "frosen = false", "encoder.vision.frosen"),
        ("training_steps", "train_steps", "encoder.segmentation.train_steps"),
        ("latent_width = 8", "latent_with = 8", "encoder.fusion.latent_with"),
        ("warmup_steps", "warm_up_steps", "training.warm_up_steps"),
        ("count = 60", "counts = 60", "calibration.counts"),
        ("can = ", "could = ", "bundle.could"),
        ("[training]", "[trainign]", "trainign"),
        ("[encoder.vision.backbone]", "[encoder.vision.backbon]", "encoder.vision.backbon"),
    ],
)
def test_an_unknown_key_is_named_with_its_file(tmp_path: Path, old: str, new: str, key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_recipe(edited(tmp_path, (old, new)))
    message = str(caught.value)
    assert str(tmp_path / "recipe.toml") in message
    assert f" {key}: no such key" in message


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("embedding_size = 8", "embeding_size = 8", "embeding_size"),
        ("decoder_hidden_size = 8", "decoder_hiden_size = 8", "decoder_hiden_size"),
    ],
)
def test_an_unknown_field_of_a_backbone_is_named(tmp_path: Path, old: str, new: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"recipe\.toml: encoder\.\w+: backbone\.{key}: no such field"):
        load_recipe(edited(tmp_path, (old, new)))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("steps = 12", 'steps = "12"', r"training\.steps: Input should be a valid integer"),
        ("steps = 12", "steps = 12.5", r"training\.steps: Input should be a valid integer"),
        ("steps = 12", "steps = true", r"training\.steps: Input should be a valid integer"),
        ("steps = 12", "steps = 0", r"training\.steps: Input should be greater than 0"),
        ("seed = 3", "seed = -3", "seed: Input should be greater than or equal to 0"),
        ("frozen = false", 'frozen = "no"', r"encoder\.vision\.frozen: Input should be a valid boolean"),
        ("tau_min = 8", 'tau_min = "8"', r"partition\.tau_min: Input should be a valid number"),
        ("tau_min = 8", "tau_min = [8, 8, 8]", "partition: tau_min has 3 values for 2 levels"),
        ("tau_max = [400, 120]", 'kind = "h3"', r"partition\.tau_max: missing"),
        ("tau_min = 8", 'kind = "s3"', r'partition: `kind` must be "s2", "h3" or "administrative"'),
        ("tau_min = 8", 'kind = "h3"\nstart_s2_level = 2', r'partition\.start_s2_level: no such key with kind = "h3"'),
        ("tau_min = 8", "tau_min = 8\nmax_h3_resolution = 9", r'max_h3_resolution: no such key with kind = "s2"'),
        ("tau_min = 8", 'kind = "administrative"', r'partition\.tau_max: no such key with kind = "administrative"'),
        ("tau_max = [400, 120]", "tau_max = []", r"partition\.tau_max: List should have at least 1 item"),
        ("\nblocks = 2", "\nblocks = -1", r"encoder\.fusion\.blocks: Input should be greater than or equal to 0"),
        ("learning_rate = 3e-3", "learning_rate = nan", r"training\.learning_rate: "),
        ('"all_cells"', '"some"', r"training\.negatives: Input should be 'batch' or 'all_cells'"),
        ('storage = "fp16"', 'storage = "fp8"', r"bundle\.storage: Input should be 'fp32', 'fp16' or 'sq8'"),
        ('name = "tiny-world"', 'name = "../escape"', "name: a bundle's name has letters"),
        ('name = "tiny-world"', "", "name: missing"),
        ("steps = 12\n", "", "training: give exactly one of `steps` and `epochs`"),
        ("class_count = 7\n", "", r"encoder\.segmentation\.class_count: missing"),
        ('source = "blue_marble"', 'source = "mars"', "data: .*'mars'.*'blue_marble', 'table', 'webdataset'"),
        ('source = "blue_marble"\n', "", "data: the key `source` is missing"),
        ('source = "blue_marble"', 'source = "table"', r"data\.table: missing"),
        (
            "image_size = 32\nfrozen",
            'image_size = 32\npretrained = "x/y"\nfrozen',
            "encoder.vision: give exactly one",
        ),
    ],
)
def test_a_wrong_or_missing_value_is_named_with_what_is_wrong(tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"recipe .*recipe\.toml: .*{problem}"):
        load_recipe(edited(tmp_path, (old, new)))


def test_a_path_must_be_a_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.table: must be a path in quotes"):
        load_recipe(edited(tmp_path, data='source = "table"\ntable = 3'))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    changes = (("seed = 3", "sede = 3"), ("steps = 12", "steps = -1"), ("\nblocks = 2", '\nblocks = "two"'))
    path = edited(tmp_path, *changes)
    with pytest.raises(ConfigurationError) as caught:
        load_recipe(path)
    for key in ("sede", "training.steps", "encoder.fusion.blocks"):
        assert f" {key}: " in str(caught.value)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_text("name = \n"), r"is not TOML: .*line 1"),
        (lambda path: path.write_bytes(b"name = '\xff'"), "is not TOML"),
        (lambda path: path.write_text(""), "name: missing"),
        (lambda path: path.write_text('data = "blue_marble"\nencoder = 3'), "encoder: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, write: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "recipe.toml"
    write(path)
    with pytest.raises(ConfigurationError, match=rf"recipe .*recipe\.toml:? .*{reason}"):
        load_recipe(path)
