"""The task predictor against scikit-learn's discriminant analysis, and against texts of no known kind."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from alter.errors import AlterError
from alter.nn.task_predictor import Features, Kind, TaskPredictor, text_features
from tests.nn.test_newcomer import model


def drawn(kinds=3, d=6, rows=200, apart=4.0, seed=0):
    """Gaussian clouds of one shape."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(d, d, generator=generator) / d**0.5 + torch.eye(d)
    centres = apart * torch.randn(kinds, d, generator=generator)
    found = []
    for _ in range(2):
        clouds = centres.unsqueeze(1) + torch.randn(kinds, rows, d, generator=generator) @ shape
        found.append({Kind(f"t{k}", "prompt"): long(clouds[k]) for k in range(kinds)})
    return found


def long(means, tokens=8.0):
    """Texts of so many tokens each."""
    return Features(means, torch.full((len(means),), tokens))


def together(part):
    return long(torch.cat([features.means for features in part.values()]))


def test_with_scales_of_one_it_is_linear_discriminant_analysis():
    train, validation = drawn(apart=1.0)
    found = TaskPredictor.fit(train, validation)
    x = together(train).means.numpy()
    y = np.repeat(np.arange(3), 200)
    means = np.stack([features.means.numpy().mean(0) for features in train.values()])
    shrinkage = ledoit_wolf((x - means[y]).astype(float), assume_centered=True)[1]
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[1 / 3] * 3).fit(x, y)
    texts = together(validation)
    found.spreads = torch.tensor([[1.0, 0.0]] * 3)
    found.temperature = torch.ones(())
    ours = found(texts)[0].softmax(-1)
    theirs = torch.from_numpy(reference.predict_proba(texts.means.numpy())).float()
    # scikit-learn shrinks the whole covariance towards its diagonal's scale by class; both agree on nearly every text.
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.97
    assert (ours - theirs).abs().mean() < 0.05


def test_its_probabilities_are_calibrated_and_its_tails_hold_what_they_say():
    train, validation = drawn(apart=0.8)
    found = TaskPredictor.fit(train, validation)
    _, fresh = drawn(apart=0.8, rows=200)
    texts, labels = together(fresh), torch.arange(3).repeat_interleave(200)
    shares, typical = found(texts)[0].softmax(-1), found(texts)[1]
    sure, right = shares.max(1).values, (shares.argmax(1) == labels).float()
    assert abs(float(sure.mean() - right.mean())) < 0.05
    own = typical.gather(1, labels.unsqueeze(1))
    assert float((own < 0.01).float().mean()) < 0.04
    assert 0.4 < float(own.mean()) < 0.6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_lies_far_from_all_is_typical_of_none(seed):
    train, validation = drawn(seed=seed)
    found = TaskPredictor.fit(train, validation)
    far = 60 * torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)
    assert float(found(long(far))[1].max()) < 0.01


def test_a_long_text_of_no_kind_is_not_typical_of_a_kind_of_short_ones():
    """Means of n draws vary as 1/n; half way between two kinds of short texts lie many of each, and no long one."""
    generator = torch.Generator().manual_seed(0)
    centres = {Kind("t0", "input"): 0.0, Kind("t1", "input"): 2.0}

    def texts(centre, rows, most):
        lengths = torch.randint(1, most + 1, (rows,), generator=generator).float()
        return Features(centre + torch.randn(rows, 6, generator=generator) / lengths.sqrt().unsqueeze(1), lengths)

    train, validation = ({kind: texts(centre, 2000, 30) for kind, centre in centres.items()} for _ in range(2))
    found = TaskPredictor.fit(train, validation)
    assert found.spreads[:, 1] / found.spreads.sum(1) == pytest.approx([1, 1], abs=0.05)
    between = torch.full((1, 6), 1.0)
    assert float(found(Features(between, torch.tensor([2.0])))[1].min()) > 0.05
    assert float(found(Features(between, torch.tensor([30.0])))[1].max()) < 0.01


def test_a_kind_joins_without_the_texts_of_the_others_and_leaves_again(tmp_path):
    train, validation = drawn(kinds=4)
    last = Kind("t3", "prompt")
    three = [{kind: rows for kind, rows in part.items() if kind != last} for part in (train, validation)]
    before = TaskPredictor.fit(*three)
    joined = before.joined_by({last: train[last]}, {last: validation[last]})
    own = validation[last]
    assert (joined(own)[0].argmax(1) == 3).float().mean() > 0.95
    assert torch.equal(joined(own)[1][:, :3], before(own)[1])
    left = joined.without("t3")
    assert left.kinds == before.kinds
    assert torch.equal(left(own)[0], before(own)[0])
    joined.save(tmp_path / "file")
    again = TaskPredictor.load(tmp_path / "file")
    assert again.kinds == joined.kinds
    assert torch.equal(again(own)[0], joined(own)[0])
    assert torch.equal(again(own)[1], joined(own)[1])


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(AlterError, match="not a readable task predictor"):
        TaskPredictor.load(tmp_path / "file")


def test_features_are_the_normalised_mean_of_the_input_embeddings():
    made = model()
    weights = made.backbone.get_input_embeddings().weight
    mean = (weights[5] + weights[7] + weights[7]) / 3
    expected = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(text_features(made, [[5, 7, 7], []]).means[0], expected)
    assert text_features(made, [[5, 7, 7], []]).lengths.tolist() == [3, 1]
