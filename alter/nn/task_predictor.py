"""Which task a text is for, where nobody says it; or that it is for none that is known."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from alter.errors import AlterError
from alter.nn.model import MTAModel

VIEWS = ("prompt", "input")  # a whole prompt, or the values of its fields alone
_TENSORS = ("means", "precision", "scales", "tails", "temperature")


class Kind(NamedTuple):
    """One kind of text.

    Attributes:
        task: its task.
        view: ``prompt`` or ``input``.
    """

    task: str
    view: str


class TaskPredictor:
    """A Gaussian for every kind of text, all of one shape: ``x ~ N(mu_c, s_c Sigma)``.

    x is the layer norm, without weights, of the mean of the backbone's frozen input embeddings over the text's tokens, as the
    Description router reads it. ``D_c = (x - mu_c)' Sigma^-1 (x - mu_c) / (s_c d)`` is 1 on average on the training texts. The
    probability of a kind is ``softmax(-d / 2 (D_c + log s_c) / temperature)``, the temperature fitted on validation. How typical a
    text is of a kind is the share of its validation texts that lie further out, by a log-normal fit to their D_c. Source: Lee et
    al., arXiv 1807.03888, at the input layer; Sigma by Ledoit and Wolf's shrinkage.

    Args:
        kinds: the texts that it knows.
        means: mu [kinds, d].
        precision: Sigma^-1 [d, d].
        scales: s [kinds].
        tails: mean and standard deviation of log D_c over the kind's validation texts, [kinds, 2].
        temperature: a scalar.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        means: Tensor,
        precision: Tensor,
        scales: Tensor,
        tails: Tensor,
        temperature: Tensor,
    ) -> None:
        self.kinds = list(kinds)
        self.means, self.precision, self.scales, self.tails, self.temperature = (
            means,
            precision,
            scales,
            tails,
            temperature,
        )

    @classmethod
    def fit(cls, train: Mapping[Kind, Tensor], validation: Mapping[Kind, Tensor]) -> Self:
        """Fits it.

        Args:
            train: features [texts, d] of every kind.
            validation: the same of other texts.
        """
        from sklearn.covariance import ledoit_wolf

        kinds = list(train)
        means = torch.stack([train[kind].mean(0) for kind in kinds])
        spread = torch.cat([train[kind] - mean for kind, mean in zip(kinds, means, strict=True)])
        covariance = torch.from_numpy(ledoit_wolf(spread.double().numpy(), assume_centered=True)[0])
        precision = torch.linalg.inv(covariance).float().contiguous()
        none = torch.ones(len(kinds)), torch.zeros(len(kinds), 2), torch.ones(())
        made = cls(kinds, means, precision, *none)
        for place, kind in enumerate(kinds):
            made.scales[place], made.tails[place] = made._spread(place, train[kind], validation[kind])
        made.temperature = made._fitted_temperature(validation)
        return made

    def without(self, task: str) -> TaskPredictor:
        """The same without a task."""
        kept = [place for place, kind in enumerate(self.kinds) if kind.task != task]
        kinds = [self.kinds[place] for place in kept]
        return TaskPredictor(
            kinds, self.means[kept], self.precision, self.scales[kept], self.tails[kept], self.temperature
        )

    def joined_by(self, train: Mapping[Kind, Tensor], validation: Mapping[Kind, Tensor]) -> TaskPredictor:
        """The same with further kinds, without a look at the texts of the others: Sigma and temperature stay."""
        kinds = [*self.kinds, *train]
        added = torch.stack([features.mean(0) for features in train.values()])
        fresh = torch.ones(len(train))
        made = TaskPredictor(
            kinds,
            torch.cat([self.means, added]),
            self.precision,
            torch.cat([self.scales, fresh]),
            torch.cat([self.tails, torch.zeros(len(train), 2)]),
            self.temperature,
        )
        for place, kind in enumerate(train, len(self.kinds)):
            made.scales[place], made.tails[place] = made._spread(place, train[kind], validation[kind])
        return made

    def _spread(self, place: int, train: Tensor, validation: Tensor) -> tuple[Tensor, Tensor]:
        scale = self._squares(train)[:, place].mean().clamp_min(1e-6)
        logs = (self._squares(validation)[:, place] / scale).clamp_min(1e-6).log()
        deviation = logs.std(unbiased=False).clamp_min(0.05)  # of few texts, or all alike
        return scale, torch.stack([logs.mean(), deviation])

    def _fitted_temperature(self, validation: Mapping[Kind, Tensor]) -> Tensor:
        from scipy.optimize import minimize_scalar

        logits = torch.cat([self._logits(validation[kind], divide=False) for kind in self.kinds])
        labels = torch.cat([torch.full((len(validation[kind]),), place) for place, kind in enumerate(self.kinds)])
        found = minimize_scalar(
            lambda log: float(F.cross_entropy(logits / math.exp(log), labels)), bounds=(0.0, 8.0), method="bounded"
        )
        return torch.tensor(math.exp(found.x))

    def _squares(self, features: Tensor) -> Tensor:
        """The squared distances over d, [texts, kinds], before the kinds' scales."""
        away = features.unsqueeze(1) - self.means
        return torch.einsum("nkd,de,nke->nk", away, self.precision, away) / features.shape[1]

    def _logits(self, features: Tensor, divide: bool = True) -> Tensor:
        d = features.shape[1]
        logits = -d / 2 * (self._squares(features) / self.scales + self.scales.log())
        return logits / self.temperature if divide else logits

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Judges texts.

        Args:
            features: [texts, d].

        Returns:
            log-probabilities up to a constant, and how typical the texts are, each [texts, kinds].
        """
        logs = (self._squares(features) / self.scales).clamp_min(1e-6).log()
        further = torch.special.ndtr((self.tails[:, 0] - logs) / self.tails[:, 1])
        return self._logits(features), further

    def save(self, file: Path) -> None:
        """Writes it as safetensors."""
        from safetensors.torch import save_file

        beside = file.with_name(f".{file.name}.{os.getpid()}")
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, beside, metadata={"kinds": json.dumps(self.kinds)})
        beside.replace(file)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Reads it.

        Raises:
            AlterError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as content:
                kinds = [Kind(*kind) for kind in json.loads(content.metadata()["kinds"])]
                return cls(kinds, *(content.get_tensor(name) for name in _TENSORS))
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise AlterError(
                f"{file}: not a readable task predictor ({error}); remove it, `alter test` makes it again."
            ) from error


@torch.no_grad()
def text_features(model: MTAModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """What a task predictor sees of tokenised texts, [texts, d]."""
    weights = cast(Tensor, model.backbone.get_input_embeddings().weight)
    means = [weights[torch.tensor(ids or [0], device=weights.device)].float().mean(0) for ids in texts]
    return F.layer_norm(torch.stack(means), weights.shape[-1:]).cpu()
