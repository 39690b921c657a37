"""`make gpu-check`: what captures and trainings of this checkout do on one GPU, in at most ten minutes.

`python -m gpu_check SIZE` with this folder's parent on PYTHONPATH. Every section runs in processes of its
own, so that what fails loses its own row only; `report.py` puts what they found into one page, with the
goals.
"""
