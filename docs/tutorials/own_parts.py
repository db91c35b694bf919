# %% [markdown]
# # Your own data, student and loss term
#
# Nothing of the package has to be changed for any of the three.

# %%
import numpy as np
import torch
from torch import nn

import rlkd

# %% [markdown]
# ## A data set
#
# Arrays, an `.npz` file or a function get a name, under which every config of this process knows them.

# %%
generator = np.random.default_rng(0)
inputs = generator.normal(size=(900, 12)).astype("float32")
labels = (inputs[:, 0] + inputs[:, 1] > 0).astype(int) + 2 * (inputs[:, 2] > 0.5)
rlkd.register_dataset("quadrants", (inputs, labels))

tiny = {
    "num_windows": 8,
    "train.steps_per_window": 30,
    "teacher.num_steps": 300,
    "student.widths": [24, 16],
    "task.num_labels": {"low": 400, "high": 400},
}
result = rlkd.distil(data="quadrants", goal=rlkd.Goal(keep=0.9), options=tiny)
print(f"accuracy {result.metrics['accuracy']:.3f}, teacher {result.metrics['teacher_accuracy']:.3f}")

# %% [markdown]
# ## A teacher and a student
#
# Any `nn.Module` that returns logits `[samples, classes]`. The student may have another structure than the teacher; the
# modules that you hand over stay as they were. What can be cut out of the student is found by tracing it.


# %%
class Convolutional(nn.Module):
    """Two convolutions and a head, over a row of numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, width, 3, padding=1),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(12 * width, 4)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """Give logits [B, 4] for rows [B, 12]."""
        return self.head(self.body(row[:, None]))


torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
optimizer = torch.optim.Adam(teacher.parameters(), 5e-3)
for _ in range(150):
    loss = nn.functional.cross_entropy(teacher(x[:600]), y[:600])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

splits = {"train": (x[:600], y[:600]), "validation": (x[600:750], y[600:750]), "test": (x[750:], y[750:])}
options = {"num_windows": 6, "train.steps_per_window": 60}
own = rlkd.distil(teacher, Convolutional(16), splits, goal=rlkd.Goal(keep=0.8), options=options)
print(f"accuracy {own.metrics['accuracy']:.3f} of the teacher's {own.metrics['teacher_accuracy']:.3f}")
print((own.folder / "mapping.txt").read_text().split("\n\n")[1])

# %% [markdown]
# ## A loss term
#
# A term is one function of named tensors. It works alone in a plain PyTorch loop, as here. `@rlkd.loss_term(...)` above it
# gives it a name, so that `options={"loss.terms": ["cross_entropy", "kl", NAME]}` trains with it under a weight that the
# policy sets ([Use it from Python](../python.md#your-own-data-set-agent-and-loss-term)).


# %%
def cosine_hint(adapted_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """One minus the cosine between the student's features and the teacher's, mean over samples."""
    return (1 - nn.functional.cosine_similarity(adapted_features, teacher_features.detach(), dim=-1)).mean()


student = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
adapter, head = nn.Linear(16, 96), nn.Linear(16, 4)
parameters = [*student.parameters(), *adapter.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, 5e-3)
for _ in range(100):
    features = student(x[:600])
    loss = nn.functional.cross_entropy(head(features), y[:600]) + cosine_hint(adapter(features), teacher[:4](x[:600]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"test accuracy of the plain loop: {float((head(student(x[750:])).argmax(-1) == y[750:]).float().mean()):.3f}")
