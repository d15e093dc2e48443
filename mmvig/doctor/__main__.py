"""Runs the report. Apart from it, since processes that are spawned cannot import this module."""

import sys

from mmvig.doctor.report import main

if __name__ == '__main__':
    sys.exit(main())
