"""Build script: `kernels/` becomes `mmvig.kernels`; configs and tools ship in `mmvig/.mim/`."""

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# What OpenMMLab's tools (mim, mmengine.hub) look for in `<package>/.mim/`.
MIM_ENTRIES = ('configs', 'tools', 'model-index.yml')


class BuildPyWithMim(build_py):
    """`build_py` that also lays `mmvig/.mim/`: copied into a wheel, linked where editable."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            self._link_mim()
            return
        # `build/lib` outlives a build, and a file that the tree has lost since must not ship.
        built = Path(self.build_lib, 'mmvig')
        shutil.rmtree(built, ignore_errors=True)
        super().run()
        self._copy_mim(built / '.mim')

    def _copy_mim(self, mim: Path) -> None:
        mim.mkdir(parents=True)
        for name in MIM_ENTRIES:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns('__pycache__', '*.pyc')
                shutil.copytree(source, mim / name, ignore=ignored)
            else:
                shutil.copy(source, mim / name)

    def _link_mim(self) -> None:
        mim = ROOT / 'mmvig' / '.mim'
        mim.mkdir(exist_ok=True)
        for name in MIM_ENTRIES:
            link = mim / name
            link.unlink(missing_ok=True)
            link.symlink_to(Path('..', '..', name))


setup(
    name='mmvig',
    version=runpy.run_path(str(ROOT / 'mmvig' / 'version.py'))['__version__'],
    description='ViG and ViT-Adapter backbones for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=[*find_packages(include=['mmvig', 'mmvig.*']), 'mmvig.kernels'],
    package_dir={'mmvig.kernels': 'kernels'},
    # mmengine, mmcv, mmdet and mmsegmentation are no core requirements: OpenMMLab's distributions
    # and OneDL's install the same modules, and one must not replace the other unasked.
    install_requires=[
        'torch>=2.4',
        'torchvision',
        'triton; platform_system == "Linux"',
        'timm>=1.0',
        'numpy',
        'pycocotools',
        'filelock',
        'safetensors',
    ],
    extras_require={
        'mm': [
            'onedl-mmengine>=0.10.12,<0.11',
            'onedl-mmcv>=2.3.6,<2.4',
            'onedl-mmdetection>=3.5.1,<3.6',
            'onedl-mmsegmentation>=1.4.2,<1.5',
        ],
        'test': ['pytest>=8', 'pytest-xdist>=3.6', 'ruff>=0.9', 'setuptools>=65', 'wheel'],
    },
    cmdclass={'build_py': BuildPyWithMim},
    zip_safe=False,
)
