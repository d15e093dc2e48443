"""Build script: `kernels/` becomes `mmvig.kernels`; configs and tools ship in `mmvig/.mim/`."""

from setuptools import find_packages, setup

setup(
    name='mmvig',
    version='0.1.0',
    packages=[*find_packages(include=['mmvig', 'mmvig.*']), 'mmvig.kernels'],
    package_dir={'mmvig.kernels': 'kernels'},
    python_requires='>=3.10',
)
