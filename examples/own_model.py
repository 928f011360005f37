"""A model and data of one's own, from Python: which formats can each layer live with?"""

import torch
from torch import nn

import bitfront as bf

generator = torch.Generator().manual_seed(0)
x = torch.randn(3000, 8, generator=generator)
y = (x @ torch.randn(8, 3, generator=generator)).argmax(1)

model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(200):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x[:2000]), y[:2000])
    loss.backward()
    optimizer.step()

run = bf.search(
    model=model,
    data=(x, y),
    space={"linear": {"name": ["integer", "affine"], "data_in_width": [4, 8], "weight_width": [2, 4, 8]}},
    metrics={"accuracy": "maximize", "model_size": "minimize"},
    strategy="brute_force",
    project="own-model",
)
for trial in run.front:
    low, high = trial.intervals["accuracy"]
    print(f"{trial.number:3d}: {trial.metrics['model_size']:.0f} bytes, accuracy {low:.3f} to {high:.3f}")
print(run.best(maximize="accuracy").config)
