"""Everything that makes a model: the simulated survey, data sets, pretraining, alignment and evaluation.

Imports run one way: this package uses `astroclip` (and, in evaluation, `index`); nothing uses this package.
The training modules import neither astropy nor faiss, so that they run on a bare GPU node.
"""
