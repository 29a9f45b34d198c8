"""Teach a Stable Diffusion checkpoint one personal concept after another.

Start reading at `pipeline.py`.
"""

__version__ = "0.1.0"
