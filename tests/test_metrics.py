"Scores over several processes, through checkpoints, and on arrays made by chance."
import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st

from geoforecast.learn.metrics import BinaryScores, average_precision, best_f1, histogram_of, roc_auc, scores_at


def forecast(seed=0, n=20_000):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, generator=generator) - 3
    return logits, (torch.rand(n, generator=generator) < logits.sigmoid()).long()


def _score_a_share(rank, world, path, out):
    dist.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=world)
    logits, target = forecast()
    metric = BinaryScores()
    metric.update(logits[rank::world], target[rank::world])
    torch.save(metric.compute(), f'{out}_{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_give_the_scores_of_one(tmp_path):
    arguments = 2, tmp_path/'rendezvous', tmp_path/'scores'
    other = mp.get_context('spawn').Process(target=_score_a_share, args=(1, *arguments))
    other.start()
    _score_a_share(0, *arguments)
    other.join(60)
    assert other.exitcode == 0
    whole = BinaryScores()
    whole.update(*forecast())
    for rank in range(2): assert torch.load(tmp_path/f'scores_{rank}.pt', weights_only=True) == whole.compute()


def test_state_survives_a_checkpoint(tmp_path):
    logits, target = forecast()
    metric, resumed = BinaryScores(), BinaryScores()
    for m in (metric, resumed): m.persistent(True)
    metric.update(logits[:7_000], target[:7_000])
    torch.save(metric.state_dict(), tmp_path/'metric.pt')
    resumed.load_state_dict(torch.load(tmp_path/'metric.pt', weights_only=True))
    for m in (metric, resumed): m.update(logits[7_000:], target[7_000:])
    assert resumed.compute() == metric.compute()


levels = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60)

@settings(deadline=None, max_examples=40)
@given(levels, st.integers(0, 20))
def test_ties_are_exact(pixels, cut):
    score, target = (np.array(v) for v in zip(*pixels))
    histogram = histogram_of(torch.logit(torch.tensor(score / 20)), torch.tensor(target))
    if target.any(): assert average_precision(histogram).item() == pytest.approx(sk.average_precision_score(target, score), abs=1e-12)
    if target.any() and not target.all(): assert roc_auc(histogram).item() == pytest.approx(sk.roc_auc_score(target, score), abs=1e-12)
    if cut < 20:
        between = scores_at(histogram, (cut + .5) / 20)
        assert between['tp'] == (target & (score > cut)).sum() and between['fp'] == (~target & (score > cut)).sum()
    f1, threshold = best_f1(histogram)
    brute = max(2 * (target & (score >= t)).sum() / (target.sum() + (score >= t).sum()) for t in np.unique(score))
    assert f1.item() == pytest.approx(brute, abs=1e-12) and scores_at(histogram, threshold.item())['f1'] == f1
