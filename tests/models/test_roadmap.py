"""The paper's roadmap to ViG: parameters of each step, and what each mixer sees."""

import pytest
import torch
from mmengine.registry import MODELS

from mmvig.kernels import reference
from mmvig.models import ViG
from mmvig.models.layers.mixer_roadmap import one_direction
from tests.models.test_vig import small_vig

PLAIN = dict(patch_embed='plain', with_pos_embed=False)
# settings of `ViG`, parameters with norm and head, and the paper's in millions (Tables 3 and 5)
STEPS = {
    'causal': (dict(scan='causal', **PLAIN), 5_711_080, 5.72),
    'patch embedding': (dict(scan='causal', with_pos_embed=False), 5_753_512, 5.75),
    'both directions': (dict(scan='shared_gate', with_pos_embed=False), 5_753_512, 5.75),
    'position embedding': (dict(scan='shared_gate'), 5_791_144, 5.79),
    'gate for each direction': (dict(scan='own_gates'), 5_810_728, 5.81),
    'locality': ({}, 5_834_536, 5.83),
    'two layers': (dict(scan='two_layers'), 6_695_464, 6.70),
}
steps = pytest.mark.parametrize('step', STEPS)


@steps
def test_parameters(step: str) -> None:
    settings, count, published = STEPS[step]
    model = MODELS.build(dict(type='ViG', arch='tiny', **settings))
    assert sum(p.numel() for p in model.parameters()) + 1000 * 192 + 1000 == count
    # docs/roadmap.md says what is known about the first step
    assert round(count / 1e6, 2) == (5.71 if step == 'causal' else published)


@steps
def test_every_parameter_has_a_gradient_at_any_size(step: str) -> None:
    model = small_vig(**STEPS[step][0])
    (out,) = model(torch.randn(2, 3, 50, 33))
    assert out.shape == (2, 32, 4, 3)
    out.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize('backward', [False, True])
def test_one_direction_is_the_recurrence(backward: bool) -> None:
    q, k, gate = torch.randn(3, 2, 70, 2, 4, dtype=torch.double).unbind()
    gate = torch.nn.functional.logsigmoid(gate)
    v = torch.randn(2, 70, 2, 8, dtype=torch.double)
    state, expected = torch.zeros(2, 2, 4, 8, dtype=torch.double), torch.zeros_like(v)
    for t in reversed(range(70)) if backward else range(70):
        state = gate[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        expected[:, t] = torch.einsum('bhk,bhkv->bhv', q[:, t], state) / 2
    torch.testing.assert_close(one_direction(q, k, v, gate, backward), expected)


@pytest.mark.gpu
@pytest.mark.parametrize('backward', [False, True])
def test_one_direction_on_the_gpu(backward: bool) -> None:
    q, k, gate = torch.randn(3, 2, 300, 2, 32).unbind()
    inputs = q, k, torch.randn(2, 300, 2, 64), torch.nn.functional.logsigmoid(gate) / 16
    expected = one_direction(*inputs, backward)
    found = one_direction(*(x.cuda() for x in inputs), backward).cpu()
    assert (found - expected).norm() / expected.norm() < 5e-3


def influence(model: ViG) -> torch.Tensor:
    """(tokens out, tokens in): whether an output depends on an input token, blocks only."""
    x = torch.randn(1, 12, model.embed_dims, requires_grad=True)
    out = model.forward_blocks(x, (3, 4), 0, len(model.blocks))
    grads = [
        torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0] for i in range(out.shape[1])
    ]
    return torch.cat(grads).ne(0).any(-1)


@steps
def test_what_a_token_sees(step: str) -> None:
    settings = STEPS[step][0]
    seen = influence(small_vig(**settings))
    expected = torch.ones(12, 12, dtype=torch.bool)
    assert torch.equal(seen, expected.tril() if settings.get('scan') == 'causal' else expected)


def test_a_shared_gate_serves_both_directions() -> None:
    mixer = small_vig(scan='shared_gate').blocks[0].attn
    x = torch.randn(1, 6, 32)
    q, k, v = mixer._heads(mixer.qkv_proj(x), [16, 16, 32])
    gate = torch.nn.functional.logsigmoid(mixer.gk_proj(x)).unflatten(-1, (2, -1)) / 16
    expected = reference.bidirectional_gla(q, k, v, gate, gate)
    torch.testing.assert_close(mixer.attend(x), expected.flatten(2))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(scan='zigzag'), "unknown scan 'zigzag': choose one of causal, shared_gate"),
        (dict(patch_embed='conv'), "patch_embed must be 'overlap' or 'plain', got 'conv'"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_vig(**settings)
