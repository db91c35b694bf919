"""Heterogeneous pairs in plain loops: the terms, an adapter, and any two modules."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.losses import cross_entropy, hint, response, rkd_distance, similarity_preserving
from rlkd.metrics import agreement
from rlkd.models.adapters import adapter, resample_tokens, tokens_to_positions


def images() -> tuple[Tensor, Tensor]:
    """[80, 1, 8, 8] with a bright quarter, whose place is the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (80,), generator=generator)
    x = 0.3 * torch.randn(80, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.7
    return x, labels


def sequences() -> tuple[Tensor, Tensor]:
    """[80, 12, 3], whose label is the channel with the largest sum."""
    x = torch.randn(80, 12, 3, generator=torch.Generator().manual_seed(1))
    return x, x.sum(1).argmax(-1)


class Patches(nn.Module):
    """A transformer on 16 patches of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, stride=2)
        self.place = nn.Parameter(0.1 * torch.randn(1, 16, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.block(self.embed(x).flatten(2).transpose(1, 2) + self.place)  # [B, 16, 16]
        return self.head(tokens.mean(1)), tokens


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, stride=4, padding=1), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.conv(x))  # [B, 6, 2, 2]
        return self.head(features.flatten(1)), features


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.lstm(x)  # [B, L, 16]
        return self.head(states[:, -1]), states


class Temporal(nn.Module):
    """A temporal convolutional network: dilated, causal, and at half the time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, dilation=2, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.first(F.pad(x.transpose(1, 2), (2, 0))))
        h = F.relu(self.second(F.pad(h, (4, 0))))  # [B, 8, 6]
        return self.head(h.mean(-1)), h.transpose(1, 2)


class Experts(nn.Module):
    """A mixture of experts, each sample going to its likeliest two of four."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 24), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        scores = self.gate(flat)
        chosen = scores.masked_fill(scores < scores.topk(2, -1).values[:, 1:], -torch.inf).softmax(-1)  # [B, 4]
        features = sum(chosen[:, i : i + 1] * expert(flat) for i, expert in enumerate(self.experts))
        return self.head(features), features


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.hidden(x.flatten(1)))
        return self.head(features), features


def fit(model: nn.Module, x: Tensor, labels: Tensor, num_steps: int = 60) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        loss = F.cross_entropy(model(x)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_transformer_teaches_convolution() -> None:
    torch.manual_seed(0)
    x, labels = images()
    teacher, student, bridge = Patches(), Convolutions(), adapter("conv", 6, 16)
    fit(teacher, x, labels)
    with torch.no_grad():
        taught, tokens = teacher(x)
    wanted = tokens_to_positions(tokens, 2, 2)  # [B, 16, 2, 2], at the convolution's resolution
    optimizer = torch.optim.Adam([*student.parameters(), *bridge.parameters()], lr=0.02)
    hints = []
    for _ in range(60):
        logits, features = student(x)
        hinted = hint(bridge(features), wanted)
        loss = cross_entropy(logits, labels) + response(logits, taught, 2.0) + hinted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hints.append(hinted.item())
    assert agreement(logits, taught) > 0.9
    assert hints[-1] < 0.9 * hints[0]


def test_lstm_teaches_temporal_convolution() -> None:
    torch.manual_seed(0)
    x, labels = sequences()
    teacher, student, bridge = Recurrent(), Temporal(), adapter("linear", 8, 16)
    fit(teacher, x, labels)
    with torch.no_grad():
        taught, states = teacher(x)
    wanted = resample_tokens(states, 6)  # [B, 6, 16], at the student's time steps
    optimizer = torch.optim.Adam([*student.parameters(), *bridge.parameters()], lr=0.02)
    before = agreement(student(x)[0], taught)
    for _ in range(60):
        logits, features = student(x)
        loss = response(logits, taught, 2.0) + 0.3 * hint(bridge(features), wanted)
        loss = loss + similarity_preserving(features.flatten(1), states.flatten(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agreement(logits, taught) > max(0.8, before)


def test_experts_teach_a_dense_student() -> None:
    torch.manual_seed(0)
    x, labels = images()
    teacher, student = Experts(), Dense()
    fit(teacher, x, labels)
    with torch.no_grad():
        taught, experts = teacher(x)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(60):
        logits, features = student(x)
        loss = response(logits, taught, 2.0) + rkd_distance(features, experts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agreement(logits, taught) > 0.9
