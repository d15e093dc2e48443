"""Checkpoints that run code where they are trusted: refused, or read without running any of it."""

import functools
import io
import operator
import os
import pickle
import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger

from mmvig.checkpoint import inert, load_pretrained, read_checkpoint
from mmvig.checkpoint.harmful import is_harmful
from tests.models.test_vig import small_vig


class Call:
    """What unpickling turns into `function(*args)`; each of these may be a `Call` in turn."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args

    def __call__(self) -> None:
        """pickle wants functions to be callable."""
        raise NotImplementedError


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# Each creates the folder or file `crater`, and is refused for a name.
BOMBS = {
    'os': (lambda crater: Call(os.mkdir, crater), 'posix.mkdir'),
    'exec': (lambda crater: Call(exec, f'import os; os.mkdir({crater!r})'), 'builtins.exec'),
    'eval': (lambda crater: Call(eval, f'__import__("os").mkdir({crater!r})'), 'builtins.eval'),
    'open': (lambda crater: Call(open, crater, 'w'), f'{open.__module__}.open'),
    'subprocess': (lambda crater: Call(subprocess.run, ['mkdir', crater]), 'subprocess.run'),
    'import': (
        lambda crater: Call(Call(getattr, Call(__import__, 'os'), 'mkdir'), crater),
        'builtins.__import__',
    ),
    'runpy': (lambda crater: Call(runpy.run_path, crater + '.py'), 'runpy.run_path'),
    'method': (lambda crater: Call(Call(getattr, Path, 'mkdir'), Path(crater)), 'pathlib'),
    'methodcaller': (
        lambda crater: Call(Call(operator.methodcaller, 'mkdir'), Path(crater)),
        'operator.methodcaller',
    ),
    'partial': (lambda crater: Call(Call(functools.partial, os.mkdir, crater)), 'posix.mkdir'),
    'map': (lambda crater: Call(list, Call(map, os.mkdir, [crater])), 'posix.mkdir'),
    'pickle': (lambda crater: Call(pickle.loads, pickle.dumps(Call(os.mkdir, crater))), 'pickle'),
    'torch': (
        lambda crater: Call(torch.storage._load_from_bytes, saved(Call(os.mkdir, crater))),
        'torch.storage._load_from_bytes',
    ),
}
PLACES = {
    'alone': lambda bomb, weights: bomb,
    'beside weights': lambda bomb, weights: {'model': weights, 'config': bomb},
    'before weights': lambda bomb, weights: {'config': bomb, 'model': weights},
    'key': lambda bomb, weights: {'model': weights, bomb: 1},
    'in a state': lambda bomb, weights: {'model': weights, 'a': SimpleNamespace(b=[{'c': bomb}])},
    'argument': lambda bomb, weights: {'model': weights, 'a': Call(range, 1, Call(int, bomb))},
}


@pytest.mark.parametrize('kind', BOMBS)
def test_bombs_are_refused_beside_good_weights(kind: str, tmp_path: Path) -> None:
    """The bomb does explode where the file is trusted."""
    build, name = BOMBS[kind]
    crater, file = tmp_path / 'crater', tmp_path / 'weights.pth'
    (tmp_path / 'crater.py').write_text(f'import os; os.mkdir({str(crater)!r})')
    torch.save({'model': small_vig().state_dict(), 'config': build(str(crater))}, file)
    model = small_vig(init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    with pytest.raises(ValueError, match='nothing in it was executed') as error:
        model.init_weights()
    assert str(error.value).startswith(f'{file} names {name}')
    assert '\n' not in str(error.value)
    assert not crater.exists()
    torch.load(file, weights_only=False)
    assert crater.exists()


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_bombs_are_found_wherever_they_are(place: str, new_format: bool, tmp_path: Path) -> None:
    file, crater = tmp_path / 'weights.pth', tmp_path / 'crater'
    content = PLACES[place](Call(os.mkdir, str(crater)), small_vig().state_dict())
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r'weights\.pth names posix\.mkdir, which can run code'):
        read_checkpoint(str(file))
    assert not crater.exists()


def explode(crater: str) -> None:
    """Stands for what no list knows."""
    os.mkdir(crater)


@pytest.mark.parametrize('place', ['beside weights', 'key', 'in a state', 'argument'])
@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_a_function_that_is_not_listed_is_not_executed_either(
    place: str, new_format: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    monkeypatch.setattr(MMLogger, 'info', lambda self, line: lines.append(line))
    source, target = small_vig(), small_vig()
    file, crater = tmp_path / 'weights.pth', tmp_path / 'crater'
    content = PLACES[place](Call(explode, str(crater)), source.state_dict())
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    load_pretrained(target, str(file))
    assert not crater.exists()
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    assert 'not read, and not executed: ' in lines[0]
    assert f'{__name__}.explode' in lines[0]


def unpickle(program: bytes) -> object:
    return inert.load(io.BytesIO(program), foreign=set())


@pytest.mark.parametrize('opcode', ['(S"crater"\ni{}\n{}\n.', '(c{}\n{}\nS"crater"\no.'])
def test_old_opcodes_execute_nothing_either(opcode: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(unpickle(opcode.format(__name__, 'explode').encode()), inert.Inert)
    with pytest.raises(inert.Refusal, match=r'names os\.mkdir'):
        unpickle(opcode.format('os', 'mkdir').encode())
    assert not list(tmp_path.iterdir())


def test_a_file_changes_no_function() -> None:
    """A pickle may set attributes of whatever it names; ours does not."""
    function = torch._utils._rebuild_tensor_v2
    program = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x07alteredI1\nsb.'
    assert pickle.loads(program) is function
    assert function.__dict__.pop('altered') == 1
    assert unpickle(program) is function
    assert 'altered' not in function.__dict__


def test_a_name_is_reported_in_one_line() -> None:
    name = b'mkdir\n\x1b[2J' + b'x' * 1000
    program = b'\x80\x04\x8c\x02os\x94X' + len(name).to_bytes(4, 'little') + name + b'\x94\x93.'
    with pytest.raises(inert.Refusal, match=r'names os\.mkdir\\n\\x1b\[2Jxx') as error:
        unpickle(program)
    assert '\n' not in str(error.value) and '\x1b' not in str(error.value)
    assert len(str(error.value)) < 400


GETATTR = b'c__builtin__\ngetattr\n'


@pytest.mark.parametrize(
    ('program', 'name'),
    [
        (b'c__builtin__\nexecfile\n.', 'builtins.execfile'),
        (b'c__builtin__\nreduce\n.', 'functools.reduce'),
        (b'ccommands\ngetoutput\n.', 'subprocess.getoutput'),
        (GETATTR + b'ctorch\noverrides\nU\x02os\x86R.', 'torch.overrides.os'),
        (
            GETATTR + b'ctorch._utils\n_rebuild_tensor\nU\x0b__globals__\x86R.',
            'torch._utils._rebuild_tensor.__globals__',
        ),
        (
            GETATTR + GETATTR + b'cnumpy\nlib\nU\x05npyio\x86RU\x04load\x86R.',
            'numpy.lib.npyio.load',
        ),
    ],
)
def test_names_of_python_2_and_of_attributes(program: bytes, name: str) -> None:
    with pytest.raises(inert.Refusal, match=f'^names {re.escape(name)},'):
        unpickle(b'\x80\x02' + program)


def test_methods_of_values_are_inert() -> None:
    assert issubclass(unpickle(b'\x80\x02' + GETATTR + b'U\x01aU\x05upper\x86R.'), inert.Inert)


def test_a_module_that_has_a_name_of_python_2_is_no_other() -> None:
    assert issubclass(unpickle(b'\x80\x04ccommands\nConfig\n.'), inert.Inert)


@pytest.mark.parametrize(
    ('module', 'name', 'harmful'),
    [
        ('torch', 'os.system', True),
        ('torch.hub', 'load_state_dict_from_url', True),
        ('os.path', 'genericpath.os.system', True),
        ('collections', '_sys.modules', False),  # another name of it: no list is complete
        ('importlib.util', 'find_spec', True),
        ('project.os', 'Config', False),
        ('torch.nn.functional', 'relu', False),
        ('torch.nn.modules.module', 'Module.load_state_dict', False),
        ('mmengine.logging.history_buffer', 'HistoryBuffer.mean', False),
        ('posixpath', 'join', False),
        ('builtins', 'set', False),
        ('types', 'SimpleNamespace', False),
    ],
)
def test_which_names_are_known(module: str, name: str, harmful: bool) -> None:
    assert is_harmful(module, name) == harmful
