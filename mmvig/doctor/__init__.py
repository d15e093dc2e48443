"""`python -m mmvig.doctor`: are the kernels right on this machine?"""
