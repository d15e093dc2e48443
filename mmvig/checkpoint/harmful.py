"""By which names a pickle runs code: processes, interpreters, loaders, files, the network.

The list is for telling users what they got, and no defence: nothing that a file names is called,
listed or not (`mmvig.checkpoint.inert`). Other programs would call it. A name counts wherever it
stands, as the function of a call, an argument or an item: training checkpoints have no use for one.
"""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# any name in these; they themselves, where another module has them as an attribute (torch.os)
MODULES = _names(
    'os posix nt sys subprocess _posixsubprocess _winapi pty shutil tempfile '
    'socket _socket ftplib smtplib telnetlib requests webbrowser '
    'importlib _imp imp zipimport pkgutil runpy pip ensurepip '
    'ctypes _ctypes cffi marshal pickle _pickle shelve '
    'bdb pdb pydoc timeit cProfile doctest atexit asyncio'
)
# what they have that is mere data
DATA = _names(
    'os.stat_result os.terminal_size os.statvfs_result posix.uname_result posix.times_result '
    'nt.uname_result nt.times_result subprocess.CompletedProcess'
)
# these, at any depth of packages that have a use otherwise
PARTS = {
    root: _names(parts)
    for root, parts in {
        'builtins': 'eval exec execfile compile open file input breakpoint help apply '
        'globals locals vars setattr delattr',
        'io': 'open open_code FileIO',
        '_io': 'open open_code FileIO',
        'pathlib': 'open write_text write_bytes touch unlink mkdir rmdir rename replace chmod '
        'symlink_to hardlink_to',
        'urllib': 'request',
        'http': 'client server',
        'distutils': 'spawn core file_util dir_util',
        'multiprocessing': 'spawnv_passfds',
        'logging': 'config FileHandler handlers',
        # what gets at attributes, or makes functions, without a name that can be read
        'operator': 'attrgetter methodcaller call',
        '_operator': 'attrgetter methodcaller call',
        'functools': 'reduce',
        '_functools': 'reduce',
        'types': 'FunctionType LambdaType CodeType',
        'cloudpickle': 'load loads subimport _make_function _make_skel_func _builtin_type',
        'dill': 'load loads load_session _create_function _create_code _import_module _eval_repr',
        # debuggers and profilers, whose names are common
        'code': 'InteractiveInterpreter InteractiveConsole interact',
        'profile': 'run runctx Profile',
        'trace': 'Trace',
        # what loads other files, which may run code in turn
        'torch': 'load save hub jit package rpc graph_module cpp_extension codecache load_library '
        'collect_env _load_from_bytes',
        'numpy': 'load loads fromfile loadtxt genfromtxt save savez savetxt f2py distutils '
        'runstring',
        'pandas': 'eval read_pickle',
        'joblib': 'load dump',
        'yaml': 'load load_all full_load full_load_all unsafe_load unsafe_load_all',
        'mmengine': 'load fromfile fromstring',
        'mmcv': 'load fromfile fromstring',
    }.items()
}
# attributes from which everything can be reached
ATTRIBUTES = _names(
    '__builtins__ __code__ __getattribute__ __globals__ __import__ __loader__ __subclasses__'
)


def is_harmful(module: str, name: str) -> bool:
    """Whether a global of a pickle is known to run code, or to lead to what does.

    Args:
        module: Name of its module, as Python 3 spells it.
        name: Its name there, with dots where it is an attribute of an attribute.
    """
    if f'{module}.{name}' in DATA:
        return False
    root, *modules = module.split('.')
    names = name.split('.')
    return (
        root in MODULES
        or not (MODULES | ATTRIBUTES).isdisjoint(names)
        or not PARTS.get(root, frozenset()).isdisjoint(modules + names)
    )
