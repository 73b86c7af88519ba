"""A step's rate, the default eps against the gradients of a large model, and the optimizer of a resumed run."""

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR

from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.models.vidtwin import VidTwin
from vidtwin.schedules import WarmupCosine
from vidtwin.training.optimization import check_length, check_resumed, make_optimizer, make_schedule, step_at
from vidtwin.training.task import AutoencoderTask

NUMBERS_PER_FRAME = 3 * 224 * 224


def default_optimizer(parameter: nn.Parameter) -> Optimizer:
    return AutoencoderTask(tiny_model()).optimizer([parameter])


@pytest.fixture(scope="module")
def gradient() -> Tensor:
    """The gradient of an encoder block at base width and resolution, with released initial values, under `mean`."""
    torch.manual_seed(0)
    model = VidTwin(num_frames=2, depth=1, qformer_depth=1, structure_channels=8, initialization="released").train()
    clip = torch.rand(1, 3, 2, 224, 224) * 2 - 1
    AutoencoderLoss(perceptual_weight=0).generator_loss(model(clip), clip, None, 0)["total"].backward()
    (block,) = model.encoder.transformer.blocks
    gradients = [parameter.grad.flatten() for parameter in block.parameters()]
    assert sum(map(len, gradients)) > 9.4e6
    return torch.cat(gradients)


def test_gradients_at_base_size_are_far_above_the_default_eps(gradient):
    size = float(gradient.square().mean().sqrt())
    assert size < 1e-6  # so small that torch's eps of 1e-8 would count
    assert default_optimizer(nn.Parameter(torch.zeros(1))).defaults["eps"] < 1e-5 * size


def test_both_reductions_take_the_same_default_steps_at_base_size(gradient):
    taken = []
    for scale in (1, NUMBERS_PER_FRAME):
        weights = nn.Parameter(torch.zeros_like(gradient))
        optimizer = default_optimizer(weights)
        weights.grad = scale * gradient
        optimizer.step()
        taken.append(weights.detach())
    # The rest are biases of keys, whose gradients are rounding errors.
    assert float((taken[0] - taken[1]).norm() / taken[1].norm()) < 0.02


def test_a_step_at_a_scaled_rate_leaves_the_schedules_rate():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=1.0)
    weight.grad = torch.ones(1)
    step_at(optimizer, 0.25)
    assert weight.item() == 0.75
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert weight.grad is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (LBFGS, "one gradient, got LBFGS, which computes the loss several times a step; set model.optimizer"),
        (SparseAdam, "dense gradients, got SparseAdam"),
        (lambda p: AdamW(p, lr=-1.0), "takes in model.optimizer, got: Invalid learning rate: -1.0"),
        (lambda p: AdamW(p, fused=True, foreach=True), "takes in model.optimizer, got: .*fused.*foreach"),
        (lambda p: AdamW(p, rate=1.0), "takes in model.optimizer, got: .*unexpected keyword argument 'rate'"),
    ],
)
def test_an_optimizer_that_cannot_take_our_steps_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make_optimizer([nn.Parameter(torch.ones(1))], make, "model.optimizer")


def test_a_schedule_that_ends_before_the_training_is_refused_also_when_resumed():
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)

    def make(steps: int, max_steps: int) -> OneCycleLR:
        return make_schedule(optimizer, lambda o: OneCycleLR(o, 1.0, steps), max_steps, "model.scheduler")

    with pytest.raises(UserError, match=r"OneCycleLR of trainer\.max_steps=5 .*, got 4; set model\.scheduler\.total_s"):
        make(4, 5)
    with pytest.raises(UserError, match=r"takes in model\.scheduler, got: You must define either total_steps"):
        make_schedule(optimizer, lambda o: OneCycleLR(o, 1.0), 5, "model.scheduler")
    longer = make(6, 6)
    longer.load_state_dict(make(4, 4).state_dict())  # which holds the length
    with pytest.raises(UserError, match="got 4"):
        check_length(longer, 6, "model.scheduler")
    whole = make(4, 4)
    for _ in range(4):
        optimizer.step()
        whole.step()


@pytest.mark.parametrize("other", [SGD, Adam, RMSprop])
def test_a_checkpoint_of_another_optimizer_is_refused(other):
    optimizer, held = (make([nn.Parameter(torch.ones(1))], lr=1e-3) for make in (other, AdamW))
    groups, schedule = held.state_dict()["param_groups"], WarmupCosine(optimizer, 1)
    with pytest.raises(UserError, match=rf"with {other.__name__}, got one with another class \(of amsgrad, betas"):
        check_resumed([optimizer], [schedule], [groups], [schedule.state_dict()])
    check_resumed([held], [schedule], [groups], [schedule.state_dict()])


def test_a_checkpoint_of_another_schedule_is_refused():
    optimizer = AdamW([nn.Parameter(torch.ones(1))])
    groups = optimizer.state_dict()["param_groups"]
    state = ConstantLR(optimizer).state_dict()  # its number `factor` would replace WarmupCosine's method
    with pytest.raises(UserError, match=r"with WarmupCosine, got one with another class \(of factor, total_iters"):
        check_resumed([optimizer], [WarmupCosine(optimizer, 1)], [groups], [state])
    state = WarmupCosine(optimizer, 1).state_dict()
    check_resumed([optimizer], [WarmupCosine(optimizer, 1)], [groups], [state])
    with pytest.raises(UserError, match=r"with ConstantLR, got one with another class"):
        check_resumed([optimizer], [ConstantLR(optimizer)], [groups], [state])
