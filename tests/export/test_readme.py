"""The README beside exported files: what whoever makes new samples must know."""

import json

import torch
from torch import nn

import bitfront as bf
from bitfront.data.base import DataRequest
from bitfront.data.loading import load_dataset


def test_it_says_how_samples_were_made_and_the_order_of_the_classes(tmp_path):
    rows = [f"{i % 7},{i * 3 % 11 + 1000},{'dog' if i % 2 else 'cat'}" for i in range(60)]
    (tmp_path / "pets.csv").write_text("\n".join(["age,weight,label", *rows]) + "\n")
    data = load_dataset(str(tmp_path / "pets.csv"), DataRequest())
    run = bf.search(
        model=nn.Linear(2, 2),
        data=data,
        space={"linear": {"name": "affine", "data_in_width": [8], "weight_width": [4, 8]}},
        metrics=["accuracy", "model_size"],
        strategy="brute_force",
        project_dir=str(tmp_path),
    )
    folder = bf.export(run.trial(0), to="c", check=False).folder
    text = (folder / "README.md").read_text()
    assert "\nClasses, in the order of the outputs: cat, dog.\n" in text
    assert "\n- target: column 'label'\n" in text
    scaler = json.loads((folder / "standardise.json").read_text())
    means, scales = torch.tensor(scaler["mean"]), torch.tensor(scaler["scale"])
    raw = torch.tensor([[float(cell) for cell in row.split(",")[:2]] for row in rows])
    x = torch.cat([data.split(split)[0] for split in ("train", "val", "test")])
    assert torch.allclose(((raw - means) / scales).sort(0).values, x.sort(0).values, atol=1e-4)
