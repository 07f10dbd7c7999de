"""Which task a text is for, where nobody says it; or that it is for none that is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from alter.errors import AlterError
from alter.nn.files import write_tensors
from alter.nn.model import MTAModel

_TENSORS = ("means", "precision", "spreads", "tails", "temperature")


class Kind(NamedTuple):
    """One kind of text.

    Attributes:
        task: its task.
        view: ``prompt`` or ``input``.
    """

    task: str
    view: str


class Features(NamedTuple):
    """What a task predictor sees of texts.

    Attributes:
        means: layer norm, without weights, of each text's mean input embedding, [texts, d].
        lengths: their tokens, [texts].
    """

    means: Tensor
    lengths: Tensor


class TaskPredictor:
    """A Gaussian for every kind of text, all of one shape: ``x ~ N(mu_c, s_c(n) Sigma)`` for a text of n tokens.

    x is the layer norm, without weights, of the mean of the backbone's frozen input embeddings over the text's tokens, as the
    Description router reads it. ``D_c = (x - mu_c)' Sigma^-1 (x - mu_c) / (s_c(n) d)`` is 1 on average on the training texts. A
    mean of few tokens varies more: ``s_c(n) = a_c + b_c / n`` by least squares, neither below 0. Without it a long text of
    any kind would be typical of a kind of short ones. The probability of a kind is
    ``softmax(-d / 2 (D_c + log s_c(n)) / temperature)``, the temperature fitted on validation. How typical a text is of a kind is
    the share of its validation texts that lie further out, by a log-normal fit to their D_c. Source: Lee et al.,
    arXiv 1807.03888, at the input layer, with s_c(n) added; Sigma by Ledoit and Wolf's shrinkage.

    Args:
        kinds: the texts that it knows.
        means: mu [kinds, d].
        precision: Sigma^-1 [d, d].
        spreads: a and b, [kinds, 2].
        tails: mean and standard deviation of log D_c over the kind's validation texts, [kinds, 2].
        temperature: a scalar.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        means: Tensor,
        precision: Tensor,
        spreads: Tensor,
        tails: Tensor,
        temperature: Tensor,
    ) -> None:
        self.kinds = list(kinds)
        self.means, self.precision, self.spreads = means, precision, spreads
        self.tails, self.temperature = tails, temperature

    @classmethod
    def fit(cls, train: Mapping[Kind, Features], validation: Mapping[Kind, Features]) -> Self:
        """Fits it.

        Args:
            train: the texts of every kind.
            validation: others.
        """
        from sklearn.covariance import ledoit_wolf

        kinds = list(train)
        means = torch.stack([train[kind].means.mean(0) for kind in kinds])
        spread = torch.cat([train[kind].means - mean for kind, mean in zip(kinds, means, strict=True)])
        covariance = torch.from_numpy(ledoit_wolf(spread.double().numpy(), assume_centered=True)[0])
        precision = torch.linalg.inv(covariance).float().contiguous()
        none = torch.ones(len(kinds), 2), torch.zeros(len(kinds), 2), torch.ones(())
        made = cls(kinds, means, precision, *none)
        for place, kind in enumerate(kinds):
            made._fit_kind(place, train[kind], validation[kind])
        made.temperature = made._fitted_temperature(validation)
        return made

    def without(self, task: str) -> TaskPredictor:
        """The same without a task."""
        kept = [place for place, kind in enumerate(self.kinds) if kind.task != task]
        kinds = [self.kinds[place] for place in kept]
        return TaskPredictor(
            kinds, self.means[kept], self.precision, self.spreads[kept], self.tails[kept], self.temperature
        )

    def joined_by(self, train: Mapping[Kind, Features], validation: Mapping[Kind, Features]) -> TaskPredictor:
        """The same with further kinds, without a look at the texts of the others: Sigma and temperature stay."""
        kinds = [*self.kinds, *train]
        added = torch.stack([features.means.mean(0) for features in train.values()])
        made = TaskPredictor(
            kinds,
            torch.cat([self.means, added]),
            self.precision,
            torch.cat([self.spreads, torch.ones(len(train), 2)]),
            torch.cat([self.tails, torch.zeros(len(train), 2)]),
            self.temperature,
        )
        for place, kind in enumerate(train, len(self.kinds)):
            made._fit_kind(place, train[kind], validation[kind])
        return made

    def _fit_kind(self, place: int, train: Features, validation: Features) -> None:
        """Fits one kind's spread and tail."""
        from scipy.optimize import nnls

        squares = self._squares(train)[:, place].double().numpy()
        terms = torch.stack([torch.ones_like(train.lengths), 1 / train.lengths], 1).double().numpy()
        self.spreads[place] = torch.from_numpy(nnls(terms, squares)[0])
        logs = self._distances(validation)[:, place].log()
        deviation = logs.std(unbiased=False).clamp_min(0.05)  # of few texts, or all alike
        self.tails[place] = torch.stack([logs.mean(), deviation])

    def _fitted_temperature(self, validation: Mapping[Kind, Features]) -> Tensor:
        from scipy.optimize import minimize_scalar

        logits = torch.cat([self._logits(validation[kind], divide=False) for kind in self.kinds])
        labels = torch.cat(
            [torch.full((len(validation[kind].lengths),), place) for place, kind in enumerate(self.kinds)]
        )
        found = minimize_scalar(
            lambda log: float(F.cross_entropy(logits / math.exp(log), labels)), bounds=(0.0, 8.0), method="bounded"
        )
        return torch.tensor(math.exp(found.x))

    def _squares(self, features: Features) -> Tensor:
        """The squared distances over d, [texts, kinds], before the kinds' scales."""
        away = features.means.unsqueeze(1) - self.means
        return torch.einsum("nkd,de,nke->nk", away, self.precision, away) / features.means.shape[1]

    def _scales(self, features: Features) -> Tensor:
        """s_c(n), [texts, kinds]."""
        return (self.spreads[:, 0] + self.spreads[:, 1] / features.lengths.unsqueeze(1)).clamp_min(1e-6)

    def _distances(self, features: Features) -> Tensor:
        return (self._squares(features) / self._scales(features)).clamp_min(1e-6)

    def _logits(self, features: Features, divide: bool = True) -> Tensor:
        d = features.means.shape[1]
        logits = -d / 2 * (self._distances(features) + self._scales(features).log())
        return logits / self.temperature if divide else logits

    def __call__(self, features: Features) -> tuple[Tensor, Tensor]:
        """Judges texts.

        Returns:
            log-probabilities up to a constant, and how typical the texts are, each [texts, kinds].
        """
        further = torch.special.ndtr((self.tails[:, 0] - self._distances(features).log()) / self.tails[:, 1])
        return self._logits(features), further

    def save(self, file: Path) -> None:
        """Writes it as safetensors."""
        write_tensors(file, {name: getattr(self, name) for name in _TENSORS}, kinds=json.dumps(self.kinds))

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
def text_features(model: MTAModel, texts: Sequence[Sequence[int]]) -> Features:
    """What a task predictor sees of tokenised texts."""
    weights = cast(Tensor, model.backbone.get_input_embeddings().weight)
    filled = [ids or [0] for ids in texts]
    means = [weights[torch.tensor(ids, device=weights.device)].float().mean(0) for ids in filled]
    lengths = torch.tensor([float(len(ids)) for ids in filled])
    return Features(F.layer_norm(torch.stack(means), weights.shape[-1:]).cpu(), lengths)
