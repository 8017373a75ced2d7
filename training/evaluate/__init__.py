"""Science evaluation: what an embedding knows, on held-out simulated galaxies and on the real sky.

* `metrics`     the numbers: R2, sigma_NMAD, outliers, recall@k, ranks, detection, bootstrap intervals
* `neighbours`  k-nearest-neighbour search and regression over arrays of embeddings
* `zeroshot`    R2 of galaxy properties from neighbours, within and across modalities
* `retrieval`   the partner of an object among a pool, both ways
* `survey`      the split's objects: labels, photometry, embeddings made shard by shard
* `encoders`    what turns grids into embeddings: the aligned model and the encoders it grew from
* `supervised`  baselines trained on labels: ResNet-18, photometry MLP, redshift CNN; `fit` is their loop,
                `baselines` their runs
* `realsky`     real DESI and SDSS objects in the simulated index
* `report`      the JSON: provenance, marks, mllog lines
* `run`         the whole evaluation

The numbers work on plain arrays; only `encoders`, `survey`, `supervised` and `realsky` know models and files.
"""
