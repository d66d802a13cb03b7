"s4GAN: one step against a plain implementation of the paper, a trajectory for each of V2's ten switches, and a training that was stopped."
import copy
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from geoforecast.core import ConfigError
from geoforecast.learn.configuration import compose
from geoforecast.learn.forecaster import mix
from geoforecast.learn.launch import Patience
from geoforecast.segmentation.data import SegmentationBatch
from geoforecast.segmentation.health import HealthLimits, HealthMonitor, HealthWarning
from geoforecast.segmentation.inputs import ImageInputs
from geoforecast.segmentation.models import DeepLabV3Plus, Discriminator
from geoforecast.segmentation.s4gan import S4GAN, V2, pseudo_labels, shared_holes, stretch

K, STEPS = 3, 9
TINY, NARROW = partial(DeepLabV3Plus, encoder='tiny', dropout_rate=0.), partial(Discriminator, width=4, dropout_rate=0.)
OFF = dict(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)


def make_batch():
    random = torch.Generator().manual_seed(1)
    image = lambda: 255*torch.rand(2, 3, 32, 32, generator=random)
    masks = torch.randint(0, K, (2, 8, 8), generator=random).repeat_interleave(4, 1).repeat_interleave(4, 2)
    masks[0, :5] = 255
    unlabelled = image()*torch.tensor([.3, 1])[:, None, None, None]
    unlabelled[1, :, 24:] = torch.nan
    return SegmentationBatch(image(), masks, unlabelled, torch.arange(2))


class Kept(S4GAN):
    "Keep the terms of every step, as they go to the log."
    def log_dict(self, terms, **kwargs):
        if 'train/lr' in terms: self.rows.append({k.removeprefix('train/'): float(v) for k, v in terms.items()})
        else: super().log_dict(terms, **kwargs)


def make(**options):
    torch.manual_seed(0)
    small = dict(discriminator=NARROW, learning_rate=1e-2, no_multi_scale=True, strong_labelled=False, save_pred_every=0)
    learner = Kept(TINY, K, **small | options)
    learner.rows = []
    return learner


def loader(n=STEPS): return DataLoader([make_batch()]*n, batch_size=None)


def trained(steps=STEPS, callbacks=(), **options):
    learner = make(**options)
    L.Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, callbacks=list(callbacks), **OFF).fit(learner, loader(steps))
    return learner


def column(learner, name): return [row.get(name) for row in learner.rows]


class Watch(L.Callback):
    "Call a function before every step, and after it."
    def __init__(self, before=None, after=None): self.before, self.after, self.seen = before, after, []
    def on_train_batch_start(self, trainer, learner, *_):
        if self.before: self.seen.append(self.before(learner))
    def on_train_batch_end(self, trainer, learner, *_):
        if self.after: self.seen.append(self.after(learner))


def test_one_step_is_the_papers():
    "Cross-entropy, feature matching and self-training by hand, then SGD and Adam by hand."
    batch = make_batch()
    start, learner = make(), make(st_start=0, threshold_st=.4)
    reference, judge = copy.deepcopy(start.network).train(), copy.deepcopy(start.discriminator).train()
    L.Trainer(max_steps=1, max_epochs=-1, limit_val_batches=0, **OFF).fit(learner, loader(1))

    torch.manual_seed(mix(learner.run_seed, 0, 0))
    images, masks = learner.labelled_views(batch)
    unlabelled, valid = learner.unlabelled_view(batch)
    one_hot = torch.stack([masks == k for k in range(K)], 1).float()
    scale = lambda x: torch.stack([(i - i.min())/(i.max() - i.min()) for i in x])
    normal = lambda x: (x - .5)/.25
    pred, other = reference(normal(images)), reference(normal(unlabelled))
    both = (masks != 255) & valid
    ce = F.cross_entropy(pred, masks, ignore_index=255)
    drawn, predicted = one_hot*both[:, None], other.softmax(1)*both[:, None]
    score, features = judge(predicted, scale(unlabelled))
    assert (score.sigmoid() > .4).all() and (~valid).sum() == 8*32
    st = F.cross_entropy(other, torch.where(valid, other.argmax(1), 255), ignore_index=255)
    fm = (judge(drawn, scale(images))[1].mean(0) - features.mean(0)).abs().mean()
    total = ce + .1*fm + st
    gradients = torch.autograd.grad(total, list(reference.parameters()))
    row = learner.rows[0]
    for name, value in dict(CE=ce, FM=fm, ST=st, total_loss=total).items(): assert row[name] == pytest.approx(value.item(), rel=1e-4)
    assert row['ST_images'] == 2 and row['ST_pixels'] == row['ST_cnt'] == 2*32*32 - 8*32 and row['accept_rate'] == 1

    sgd, adam = learner.optimizers(use_pl_optimizer=False)
    assert all((g['momentum'], g['weight_decay']) == (.9, 5e-4) for g in sgd.param_groups) and adam.param_groups[0]['betas'] == (.9, .99)
    heads = {id(p) for name, p in reference.named_parameters() if not name.startswith('encoder.')}
    for p, new, g in zip(reference.parameters(), learner.network.parameters(), gradients):
        torch.testing.assert_close(new, p - (10 if id(p) in heads else 1)*1e-2*(g + 5e-4*p), rtol=1e-3, atol=1e-5)

    real, fake = judge(drawn, scale(images))[0].sigmoid(), judge(predicted.detach(), scale(unlabelled))[0].sigmoid()
    loss = .5*(F.binary_cross_entropy(real, torch.ones(2)) + F.binary_cross_entropy(fake, torch.zeros(2)))
    assert row['D'] == pytest.approx(loss.item(), rel=1e-4)
    adam = torch.optim.Adam(judge.parameters(), 1e-4, betas=(.9, .99))
    adam.zero_grad(); loss.backward(); adam.step()
    for expected, new in zip(judge.parameters(), learner.discriminator.parameters()): torch.testing.assert_close(new, expected, rtol=1e-3, atol=2e-6)


def test_1_gradient_clipping():
    def used(**options):
        norms = []
        def note(optimizer, *_): norms.append(torch.stack([p.grad.norm() for g in optimizer.param_groups for p in g['params'] if p.grad is not None]).norm().item())
        class Hook(L.Callback):
            def on_train_start(self, trainer, learner): learner._main_optimizer().optimizer.register_step_pre_hook(note)
        learner = trained(callbacks=[Hook()], **options)
        return np.array(norms), learner
    free, learner = used()
    np.testing.assert_allclose(free, column(learner, 'grad_norm'), rtol=1e-4)
    limit = float(np.median(free))
    cut, learner = used(gradient_clip=limit)
    np.testing.assert_allclose(cut, np.minimum(column(learner, 'grad_norm'), limit), rtol=1e-4)
    assert free.max() > limit*1.001 and (cut <= limit*1.001).all()


def test_2_cosine_annealing():
    rates = lambda learner: [g['lr'] for o in learner.optimizers(use_pl_optimizer=False) for g in o.param_groups]
    def run(**options):
        watch = Watch(after=rates)
        trained(20, [watch], **options)
        return np.array(watch.seen)
    poly, cosine, t = run(), run(schedule='cosine', warmup_steps=1000), np.arange(20)
    peaks = [1e-2, 1e-1, 1e-4] # encoder, heads, discriminator
    np.testing.assert_allclose(poly, np.outer((1 - t/20)**.9, peaks), rtol=1e-6)
    rise = .01 + .99*(1 + np.cos(np.pi*(t - 2)/18))/2
    rise[:2] = 1/3, 2/3 # the warm-up is at most a tenth of the run
    np.testing.assert_allclose(cosine, np.outer(rise, peaks), rtol=1e-6)


def test_3_weight_average():
    watch = Watch(after=lambda learner: {k: v.detach().double().clone() for k, v in learner.network.state_dict().items() if v.is_floating_point()})
    learner = trained(callbacks=[watch], ema_decay=.8)
    state = {k: v for k, v in learner.predictor.state_dict().items() if v.is_floating_point()}
    assert any('running_var' in k for k in state)
    for name, value in state.items():
        average = watch.seen[0][name]
        for t, weights in enumerate(watch.seen[1:], 1):
            decay = min(1 - 1/(t + 1), .8)
            average = decay*average + (1 - decay)*weights[name]
        torch.testing.assert_close(value.double(), average, rtol=1e-4, atol=1e-6)
    assert trained(2).predictor is not learner.predictor and make().average is None


class Constant(nn.Module):
    "Judge every map alike."
    def __init__(self, num_classes, input_dim, score=.1):
        super().__init__()
        self.score, self.weight = torch.tensor(score).logit(), nn.Parameter(torch.zeros(()))
    def forward(self, class_map, image): return self.score + 0*self.weight*class_map.mean((1, 2, 3)), class_map.mean((2, 3))


def test_4_rising_threshold():
    "A score of .1 passes while the threshold is below it: for the first third of a rise from .05 to .2."
    options = dict(discriminator=Constant, st_start=0)
    fixed, rising = trained(**options), trained(threshold_st_initial=.05, **options)
    assert column(fixed, 'ST_images') == [0]*STEPS and set(np.round(column(fixed, 'thresh'), 6)) == {.2}
    np.testing.assert_allclose(column(rising, 'thresh'), .05 + .15*np.arange(STEPS)/STEPS, rtol=1e-5)
    chosen = [int(n) for n in column(rising, 'ST_images')]
    third = STEPS//3
    assert chosen[:third] == [2]*third and chosen[third + 1:] == [0]*(STEPS - third - 1)


def test_5_late_discriminator():
    weights = lambda learner: nn.utils.parameters_to_vector(learner.discriminator.parameters()).detach().clone()
    changes = {}
    for start in (0, 5):
        watch = Watch(before=weights, after=weights)
        learner = trained(callbacks=[watch], discriminator_start=start)
        changes[start] = [not torch.equal(a, b) for a, b in zip(watch.seen[::2], watch.seen[1::2])]
        for name in ('D', 'FM'): assert [v is not None for v in column(learner, name)] == changes[start]
    assert changes == {0: [True]*STEPS, 5: [False]*5 + [True]*(STEPS - 5)}


def test_6_early_self_training():
    begins = {start: next(i for i, v in enumerate(column(trained(st_start=start), 'ST')) if v is not None) for start in (3, 8)}
    assert begins == {3: 3, 8: 8} and make(st_start=8).silent_from == 8


def test_7_rising_weight():
    options = dict(discriminator=partial(Constant, score=.9), st_start=2)
    for initial, expected in ((None, np.ones(STEPS - 2)), (.1, .1 + .9*np.minimum(np.arange(STEPS - 2)/(.5*STEPS), 1))):
        learner = trained(st_weight_initial=initial, st_ramp=.5, **options)
        weights = [(r['total_loss'] - r['CE'] - .1*r['FM'])/r.get('ST', 1) for r in learner.rows]
        np.testing.assert_allclose(weights, [0, 0, *expected], atol=2e-3)


def validated(epochs, callbacks=(), **options):
    "Train and validate, an evaluation every two steps; training tiles are the second loader."
    batch = make_batch()
    wrong = batch._replace(target=torch.where(batch.target == 255, 255, (batch.target + 1) % K))
    learner = make(**options)
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **OFF)
    trainer.fit(learner, loader(2), [DataLoader([b], batch_size=None) for b in (wrong, batch)])
    return trainer


def test_8_stability_monitor():
    "Nothing is learnt at a rate of 0 with batch statistics that stay, so no evaluation gains on the first."
    class Still(L.Callback):
        def on_fit_start(self, trainer, learner):
            for m in learner.network.modules():
                if isinstance(m, nn.BatchNorm2d): m.momentum = 0.
    assert V2['stability_monitor'] == dict(patience=15)
    monitor = Patience('val/miou', mode='max', patience=3)
    assert validated(6, [Still()], learning_rate=0.).current_epoch == 6
    assert validated(6, [Still(), monitor], learning_rate=0.).current_epoch == 4 and monitor.best_score > 0


def test_9_gap_monitor():
    def told(recwarn, **options):
        recwarn.clear()
        validated(1, **options)
        return [str(w.message) for w in recwarn if isinstance(w.message, HealthWarning)]
    with pytest.warns() as recwarn:
        assert not [text for text in told(recwarn) if 'gap' in text]
        low = HealthLimits(gap_warning=-1., gap_alarm=None, gap_severe=None)
        assert any('gap_warning -1.0' in text for text in told(recwarn, limits=low))
    assert [getattr(make().limits, k) for k in V2['gap_monitor']] == [None, None]


def test_10_batch_normalisation():
    "What the network sees has mean 0 and deviation 1 over each batch, and the discriminator sees dark images dark."
    def seen(normalisation):
        learner, images, judged = make(inputs=ImageInputs(normalisation=normalisation)), [], []
        learner.network.register_forward_pre_hook(lambda _, args: images.append(args[0].detach()))
        learner.discriminator.register_forward_pre_hook(lambda _, args: judged.append(args[1].detach()))
        L.Trainer(max_steps=1, max_epochs=-1, limit_val_batches=0, **OFF).fit(learner, loader(1))
        return images, judged
    batch, dataset = seen('batch'), seen('dataset')
    for image in batch[0]:
        torch.testing.assert_close(image.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(image.std((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    assert dataset[0][1].mean() < -.2 # the unlabelled images are darker than the training
    for image in dataset[1]: assert image.amax((1, 2, 3)).tolist() == [1, 1] and image.amin((1, 2, 3)).tolist() == [0, 0]
    dark = [image for image in batch[1] if image.amax((1, 2, 3))[0] < .5]
    assert len(dark) == 2 and all(image.amax() == 1 for image in batch[1]) # predicted maps are judged twice a step


def test_switches_are_options():
    assert len(V2) == 10
    plain = compose('segmentation/s4gan')
    for name, options in V2.items(): assert compose(plain, **options) != plain, name
    together = compose(plain, **{k: v for options in V2.values() for k, v in options.items()})
    assert together == compose('segmentation/s4gan_v2')


def test_a_stopped_training_goes_on(tmp_path):
    options = dict(ema_decay=.9, st_start=2, discriminator_start=1, threshold_st=.4, schedule='cosine', st_weight_initial=.1)
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, learner): trainer.should_stop = trainer.current_epoch == 1
    def run(callbacks=(), path=None):
        learner = make(**options)
        trainer = L.Trainer(max_epochs=3, limit_val_batches=0, callbacks=list(callbacks), **OFF)
        trainer.fit(learner, loader(3), ckpt_path=path, weights_only=True)
        return learner, trainer
    whole, _ = run()
    half, trainer = run([Stop()])
    trainer.save_checkpoint(tmp_path/'half.ckpt')
    assert 0 < trainer.global_step < 9
    rest, _ = run(path=tmp_path/'half.ckpt')
    assert half.rows + rest.rows == whole.rows
    for name, value in whole.state_dict().items():
        if 'metrics' not in name: assert torch.equal(rest.state_dict()[name], value), name


def test_what_the_network_wants_does_not_train_the_discriminator():
    learner = make(fm_weight=10.)
    class Look(L.Callback):
        def on_train_batch_end(self, trainer, learner, *_): self.trainable = [p.requires_grad for p in learner.discriminator.parameters()]
    learner.after_step = lambda batch: {}
    before = copy.deepcopy(learner.discriminator.state_dict())
    L.Trainer(max_steps=3, max_epochs=-1, limit_val_batches=0, **OFF).fit(learner, loader(3))
    assert all(p.grad is None for p in learner.discriminator.parameters())
    assert all(torch.equal(before[k], v) for k, v in learner.discriminator.state_dict().items())


def test_unlabelled_images_get_the_same_views():
    "Changes of light on one kind of image alone would tell the discriminator which is which."
    for strong, expected in ((True, 2), (False, 0)):
        learner, changed = make(strong_labelled=strong), []
        learner.strong = lambda images: changed.append(1 - images) or changed[-1]
        judged = []
        learner.discriminator.register_forward_pre_hook(lambda _, args: judged.append(args[1].detach()))
        L.Trainer(max_steps=1, max_epochs=-1, limit_val_batches=0, **OFF).fit(learner, loader(1))
        assert len(changed) == expected and all(any(torch.equal(stretch(c), j) for j in judged) for c in changed)


def test_maps_have_the_same_holes():
    "Whatever the two batches are, drawn and predicted maps have as many holes, so that holes tell nothing."
    random = torch.Generator().manual_seed(0)
    drawn, seen = (torch.rand(n, 8, 8, generator=random) > .3 for n in (4, 4))
    stay, others = shared_holes(drawn, seen)
    assert torch.equal(stay, others) and torch.equal(stay, drawn & seen) and 0 < stay.float().mean() < .6


def test_threshold_is_not_passed_by_equality():
    probabilities, seen = torch.ones(2, 1, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool)
    _, chosen = pseudo_labels(probabilities, torch.tensor([0., 1e-3]), .5, seen)
    assert chosen.tolist() == [False, True]


def test_self_training_waits_for_the_discriminator():
    with pytest.raises(ConfigError, match='st_start 100 lies before discriminator_start 500'): make(st_start=100, discriminator_start=500)
