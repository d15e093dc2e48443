"""timm's ViT as a trunk: the same as timm's own model, windows, checkpoints with a class token."""

import timm
import torch

from mmvig.models import TimmViT
from mmvig.models.backbones.vit import run_in_windows


def deit_tiny(**settings) -> torch.nn.Module:
    """timm's own model without class token and head."""
    return timm.create_model(
        'deit_tiny_patch16_224', num_classes=0, class_token=False, global_pool='', **settings
    )


def test_same_as_timm() -> None:
    theirs, ours = deit_tiny().eval(), TimmViT('tiny').eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    expected = theirs.forward_features(x).transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(ours(x)[0], expected)


def test_windows_see_their_window_only() -> None:
    """Each whole window attends as if it were an image of its own."""
    block = TimmViT('tiny').eval().blocks[0]
    x = torch.randn(2, 8, 12, 192)
    out = run_in_windows(block, x.flatten(1, 2), (8, 12), 4).unflatten(1, (8, 12))
    for row in (0, 4):
        for col in (0, 4, 8):
            window = x[:, row : row + 4, col : col + 4]
            expected = block(window.flatten(1, 2)).unflatten(1, (4, 4))
            torch.testing.assert_close(out[:, row : row + 4, col : col + 4], expected)


def test_window_pattern_and_padding() -> None:
    model = TimmViT('tiny', window_size=3, out_indices=(0, 2)).eval()
    x = torch.randn(1, 3, 80, 112, requires_grad=True)
    windowed, everywhere = model(x)
    assert windowed.shape == everywhere.shape == (1, 192, 5, 7)
    (grad,) = torch.autograd.grad(windowed[0, :, 0, 0].sum(), x, retain_graph=True)
    assert not grad[0, :, 48:].any()
    (grad,) = torch.autograd.grad(everywhere[0, :, 0, 0].sum(), x)
    assert grad[0, :, 64:].any()


def test_checkpoint_with_class_token(tmp_path) -> None:
    full = timm.create_model('deit_tiny_patch16_224')
    torch.save({'model': full.state_dict()}, tmp_path / 'deit.pth')
    model = TimmViT('tiny', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'deit.pth')))
    model.init_weights()
    torch.testing.assert_close(model.pos_embed, full.pos_embed[:, 1:])
    torch.testing.assert_close(model.blocks[3].mlp.fc1.weight, full.blocks[3].mlp.fc1.weight)
