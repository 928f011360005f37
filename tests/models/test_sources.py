"""Models of libraries by prefix: built, with and without weights from caches that the tests write, searched, rebuilt."""

import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront import libraries
from bitfront.checkpoints import save_checkpoint
from bitfront.config import load_config
from bitfront.data.base import DataRequest
from bitfront.data.loading import load_dataset
from bitfront.engine.analysis import analyze_config
from bitfront.errors import CheckpointError, ConfigError, MissingExtraError, UnknownNameError
from bitfront.graph import capture
from bitfront.models.base import build_model, needs_of
from bitfront.models.sources import source_of
from bitfront.transforms.fold import folded

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "a"]


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def timm():
    libraries.torchvision("a test")  # timm imports it
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder that save_pretrained wrote: a tiny BERT with a classifier of two classes, and its tokenizer."""
    libraries.torchvision("a test")
    library = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub") / "tiny-bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = library.BertTokenizer(str(folder / "vocab.txt"), model_max_length=12)
    torch.manual_seed(0)
    config = library.BertConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=12, num_labels=2)
    library.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_word_before_the_colon_decides():
    assert source_of("timm:resnet18")[1] == "resnet18"
    assert source_of("hf:./a/b:c")[1] == "./a/b:c"
    assert source_of("timm.models:resnet18") is None
    assert source_of("Timm:resnet18") is None  # another module of the user
    assert source_of("jsc-tiny") is None


def test_a_model_of_timm(timm):
    needs = needs_of("timm:test_resnet.r160_in1k")
    assert needs.size == (160, 160)
    assert needs.shorter == 168
    assert needs.mean == (0.5, 0.5, 0.5)
    torch.manual_seed(9)
    one = build_model("timm:test_resnet.r160_in1k", (1, 32, 32), 3, seed=4)
    assert same(one, build_model("timm:test_resnet", (1, 32, 32), 3, seed=4))
    assert one(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    # An attention over patches has positions, so it is made for the size of the images.
    assert build_model("timm:test_vit", (3, 48, 48), 3, seed=0)(torch.randn(2, 3, 48, 48)).shape == (2, 3)


def test_a_model_of_torchvision():
    libraries.torchvision("a test")
    needs = needs_of("torchvision:squeezenet1_1")
    assert (needs.size, needs.shorter, needs.num_classes) == ((224, 224), 256, 1000)
    assert build_model("torchvision:squeezenet1_1", (3, 32, 32), 4, seed=0)(torch.randn(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_resnt", r"timm has no model 'test_resnt'\. Near it: test_resnet"),
        ("timm:test_resnet.foo", r"has no weights called 'foo'; allowed: r160_in1k"),
        ("torchvision:resnet", r"network 'resnet'\. Near it: resnet"),
        ("hf:./nowhere", r"there is no folder \./nowhere"),
    ],
)
def test_unknown_names_list_near_ones(timm, name, message):
    with pytest.raises(UnknownNameError, match=message):
        build_model(name, (3, 32, 32), 3, 0)


def test_samples_that_do_not_fit(timm, bert):
    with pytest.raises(ConfigError, match=r"takes images.*shape \(16,\)"):
        build_model("timm:test_resnet", (16,), 3, 0)
    with pytest.raises(ConfigError, match="takes texts as ids of tokens"):
        build_model(f"hf:{bert}", (3, 8, 8), 2, 0)
    with pytest.raises(ConfigError, match="weights = true is for a model of a library"):
        build_model("jsc-tiny", (16,), 5, 0, weights=True)


def test_weights_of_timm_come_from_the_cache_of_the_hub(timm, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "timm:test_resnet.r160_in1k"
    with pytest.raises(CheckpointError, match=r"are not in the cache .*Without a network: .*pretrained=True.*HF_HOME"):
        build_model(name, (3, 32, 32), 1000, 0, weights=True)
    torch.manual_seed(7)
    trained = timm.create_model("test_resnet.r160_in1k", num_classes=1000)
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    save_checkpoint(trained.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    assert same(build_model(name, (3, 32, 32), 1000, 0, weights=True), trained)
    assert same(build_model(name, (3, 32, 32), 0, 0, weights=True), trained)
    # Another classifier is new, and all before it has the weights.
    other = build_model(name, (3, 32, 32), 3, 0, weights=True)
    assert torch.equal(other.conv1[0].weight, trained.conv1[0].weight)
    assert torch.equal(other.fc.weight, build_model(name, (3, 32, 32), 3, 0).fc.weight)


def test_weights_of_torchvision_come_from_the_cache_of_torch(tmp_path, monkeypatch):
    models = libraries.torchvision("a test", "torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "squeezenet1_1"
    monkeypatch.setattr(torch.hub, "download_url_to_file", _unreachable)
    with pytest.raises(CheckpointError, match=r"no route to host.*squeezenet1_1-\w+\.pth on another machine and put"):
        build_model(f"torchvision:{name}", (3, 32, 32), 1000, 0, weights=True)
    torch.manual_seed(7)
    trained = models.squeezenet1_1(num_classes=1000)
    file = models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(trained.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    assert same(build_model(f"torchvision:{name}", (3, 32, 32), 1000, 0, weights=True), trained)
    other = build_model(f"torchvision:{name}", (3, 32, 32), 3, 0, weights=True)
    assert torch.equal(other.features[0].weight, trained.features[0].weight)


def _unreachable(*args, **kwargs):
    raise OSError("no route to host")


def test_code_of_a_repository_is_never_run(tmp_path):
    libraries.torchvision("a test")
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(ConfigError, match=r"which Bitfront never runs \(trust_remote_code is off\)"):
        build_model(f"hf:{tmp_path}", {"input_ids": (4,)}, 2, 0)


TEXTS = [f"{'very ' * (i % 3)}{'good' if i % 2 else 'bad'} film" for i in range(24)]
SPACE = {"linear": {"name": "integer", "data_in_width": [8], "weight_width": [4, 8], "weight_frac_width": ["auto"]}}
METRICS = {"accuracy": "maximize", "average_bitwidth": "minimize"}


@pytest.mark.slow
def test_texts_and_a_model_of_a_folder(bert, tmp_path):
    """Weights of the library with their classifier: nothing is trained; the tokenizer is the model's."""
    arrow = pytest.importorskip("datasets")
    features = arrow.Features({"text": arrow.Value("string"), "label": arrow.ClassLabel(names=["bad", "good"])})
    rows = {"text": TEXTS, "label": [i % 2 for i in range(24)]}
    arrow.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "reviews"))
    notes = []
    run = bf.search(
        model=f"hf:{bert}",
        data=f"hf:{tmp_path / 'reviews'}",
        weights=True,
        space=SPACE,
        metrics=METRICS,
        strategy="evolution",
        n_trials=3,
        project_dir=str(tmp_path),
        project="run",
        events=_noting(notes),
    )
    text = "\n".join(notes)
    assert f"weights of hf:{bert}, from its library" in text
    assert "ids of 6 tokens by the tokenizer" in text
    assert "training" not in [p.name for p in run.folder.iterdir()]
    # The weights are in the run folder: those of the library may have changed since, or are gone.
    (bert / "model.safetensors").rename(tmp_path / "gone")
    try:
        rebuilt = bf.transform_trial(run.folder, run.front[0].number, check=True)
    finally:
        (tmp_path / "gone").rename(bert / "model.safetensors")
    assert rebuilt.evaluation.accuracy == run.front[0].metrics["accuracy"]


def _noting(notes):
    events = bf.Events()
    events.note = notes.append
    return events


@pytest.mark.parametrize(
    ("overrides", "input_shape", "classes"),
    [
        ({"model": "JSC_tiny"}, (16,), 5),
        ({"model": "digits-mlp"}, (1, 8, 8), 10),
        ({"model": "ds-cnn-small"}, (1, 49, 10), 12),
        ({"model": "timm:test_resnet", "dataset_settings.image_size": 32}, (3, 32, 32), 1000),
    ],
)
def test_analysis_needs_no_data(timm, overrides, input_shape, classes, monkeypatch):
    monkeypatch.setattr("bitfront.engine.planning.inputs.load_dataset", _unreachable)
    found = analyze_config(load_config(None, overrides))
    assert found.rows[0].inputs[0] == input_shape
    assert found.rows[-1].output[-1] == classes
    with pytest.raises(OSError, match="no route"):
        analyze_config(load_config(None, {**overrides, "dataset": "digits"}))


def test_a_model_brings_its_data():
    assert load_config(None, {"model": "jsc_tiny"}).dataset == "jsc"
    assert load_config(None, {"model": "ds-cnn"}).dataset == "synthetic-keywords"
    assert load_config(None, {"model": "jsc-tiny", "dataset": "digits"}).dataset == "digits"
    assert load_config().dataset == "digits"
    with pytest.raises(ConfigError, match="does not say which data it is for"):
        bf.plan(load_config(None, {"model": "timm:test_resnet"}).model_copy(update={"search": _search()}))


def _search():
    return load_config(Path(__file__).parents[2] / "examples" / "kws_mcu.toml").search


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory, timm, warm):
    """A search of a model of timm on a folder of images, by the command line, from a relative path."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    for name, shade in (("cat", 0), ("dog", 90)):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = (rng.integers(0, 100, (20, 18, 3)) + shade).astype(np.uint8)
            image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
    words = (
        "search --model timm:test_vit --dataset photos --image-size 32 --max-epochs 1 --n-trials 3 --project run --json"
    )
    process = warm.start(["-m", "bitfront", *words.split()], root, dict(os.environ))
    printed, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return root, json.loads(printed), said


@pytest.mark.slow
def test_a_search_of_a_library_and_a_folder(folder_run):
    root, _, notes = folder_run
    assert "images: 32 x 32 pixels, others are resized (bicubic; the shorter side 34 pixels" in notes
    assert "(as timm's test_vit)" in notes
    run = bf.Run.load(root / "runs" / "run")
    assert run.config.dataset == str(root / "photos")
    # The configuration in the run folder has whole paths, and means the same search.
    assert bf.plan(run.config).identity(None)["dataset"] == "photos"
    # From the run folder alone, in another folder and process than those of the search.
    trial = run.front[0]
    rebuilt = bf.transform_trial(run.folder, trial.number, check=True)
    assert rebuilt.evaluation.accuracy == trial.metrics["accuracy"]


@pytest.mark.slow
def test_a_rebuilt_trial_as_safetensors(folder_run):
    root, *_ = folder_run
    run = bf.Run.load(root / "runs" / "run")
    rebuilt = bf.transform_trial(run.folder, run.front[0].number)
    read = pytest.importorskip("safetensors.torch").load_file(rebuilt.folder / "model.safetensors")
    assert read.keys() == rebuilt.model.state_dict().keys()
    assert all(torch.equal(read[k], v) for k, v in rebuilt.model.state_dict().items())


def test_texts_of_a_table_by_the_tokenizer_of_the_model(bert, tmp_path):
    pytest.importorskip("pyarrow")
    lines = [f"{text},{i % 2}" for i, text in enumerate(TEXTS)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    data = load_dataset(str(tmp_path / "reviews.csv"), DataRequest(needs=needs_of(f"hf:{bert}")))
    assert [one.name for one in data.inputs] == ["input_ids", "token_type_ids", "attention_mask"]
    ids = torch.cat([data.inputs[0].unpacked(x) for x in data.x.values()])
    # [CLS] (very) (very) good film [SEP], filled up with [PAD].
    assert [2, 5, 7, 3, 0, 0] in ids.tolist()
    assert int(ids.max()) < len(WORDS)
    settings = {"max_length": 4}
    cut = load_dataset(str(tmp_path / "reviews.csv"), DataRequest(needs=needs_of(f"hf:{bert}"), settings=settings))
    assert cut.inputs[0].shape == (4,)
    assert any("have 4 or more, and are cut" in note for note in cut.notes)


def test_images_and_a_model_of_a_folder(tmp_path):
    libraries.torchvision("a test")
    library = pytest.importorskip("transformers")
    config = library.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    torch.manual_seed(3)
    trained = library.ViTForImageClassification(config)
    trained.save_pretrained(tmp_path)
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    needs = needs_of(f"hf:{tmp_path}")
    assert (needs.size, needs.mean, needs.num_classes) == ((16, 16), (0.5, 0.4, 0.3), 3)
    assert same(build_model(f"hf:{tmp_path}", (3, 16, 16), 3, 0, weights=True), trained)
    other = build_model(f"hf:{tmp_path}", (3, 16, 16), 5, 0, weights=True)
    assert other.classifier.out_features == 5
    assert torch.equal(other.vit.embeddings.cls_token, trained.vit.embeddings.cls_token)


def test_a_mapped_search_holds_what_it_needs_alone(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 500), ("val", 40), ("test", 40)):
        x = rng.normal(size=(count, 16)).astype(np.float32)
        np.save(tmp_path / f"x_{split}.npy", x)
        np.save(tmp_path / f"y_{split}.npy", (x[:, 0] > 0).astype(np.int64))
    run = bf.search(
        model="jsc-tiny",
        data=str(tmp_path),
        space=SPACE,
        metrics=METRICS,
        strategy="brute_force",
        max_epochs=1,
        limit_bytes=1,
        project_dir=str(tmp_path),
        project="run",
    )
    assert run.config.dataset == str(tmp_path)
    plan = bf.plan(run.config)
    assert plan.dataset.mapped
    # What travels to worker processes is two samples, not the file that they are a view of.
    assert plan.evaluator.job.sample.untyped_storage().nbytes() == 2 * 16 * 4
    rebuilt = bf.transform_trial(run.folder, 0, check=True)
    assert rebuilt.evaluation.accuracy == run.trial(0).metrics["accuracy"]


def test_the_plan_says_which_weights_are_meant(bert, tmp_path):
    pytest.importorskip("pyarrow")
    lines = [f"{text},{i % 3}" for i, text in enumerate(TEXTS)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    values = {"model": f"hf:{bert}", "dataset": str(tmp_path / "reviews.csv"), "weights": True}
    search = {"search.strategy.name": "evolution", "search.strategy.setup.n_trials": 2}
    example = Path(__file__).parents[2] / "examples" / "jsc_toy_strategies.toml"
    plan = bf.plan(load_config(example, {**values, **search}))
    assert any("a new classifier for 3 outputs: it is trained from them" in note for note in plan.notes)
    assert plan.identity(None)["library_weights"]
    assert plan.identity(None)["training"] != "none, the weights are given"


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("timm:test_resnet", "timm", "timm"),
        ("timm:test_resnet", "torchvision", "timm"),
        ("torchvision:resnet18", "torchvision", "torchvision"),
        ("hf:prajjwal1/bert-tiny", "transformers", "hf"),
    ],
)
def test_the_extra_to_install_is_named(monkeypatch, name, module, extra):
    for known in [module, *(m for m in sys.modules if m.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, known, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'bitfront\[{extra}\]'"):
        needs_of(name)


def test_norms_that_end_in_an_activation_are_folded(timm):
    """What follows the norm stays, under its names; a norm that cannot be folded says why, as any other."""
    norm = timm.layers.BatchNormAct2d
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3, bias=False),
            bn=norm(4, act_layer=nn.Hardswish, drop_layer=nn.Dropout),
            alone=norm(4),
            last=nn.Conv2d(4, 4, 1),
            plain=norm(4, apply_act=False),
            end=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        )
    ).eval()
    for changed in (model.bn, model.alone, model.plain):
        changed.running_mean.normal_()
        changed.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 6, 6)
    result = folded(capture(model, x))
    assert result.into == {"bn": "conv", "plain": "last"}
    assert "it follows bn.act (Hardswish)" in result.kept["alone"]
    assert type(result.graph.model.get_submodule("bn.act")) is nn.Hardswish
    with torch.no_grad():
        assert torch.allclose(result.graph.model(x), model(x), atol=1e-5)
    model.bn.register_forward_hook(lambda module, inputs, output: output)
    kept = folded(capture(model, x))
    assert kept.into == {"plain": "last"}
    assert "hook" in kept.kept["bn"]
