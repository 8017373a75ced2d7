"""Science evaluation: what an embedding knows, on held-out simulated galaxies and on the real sky.

* `metrics`     the numbers: R2, sigma_NMAD, outliers, recall@k, ranks, detection, bootstrap intervals
* `neighbours`  k-nearest-neighbour search and regression over arrays of embeddings
* `zeroshot`    R2 of galaxy properties from neighbours, within and across modalities; `fewshot` by a small network
* `retrieval`   the partner of an object among a fixed pool, both ways
* `morphology`  shapes of simulated galaxies, votes on real pictures
* `tasks`       all of these for one encoder
* `survey`      the split's objects: labels, photometry, embeddings made shard by shard and cached
* `encoders`    what turns grids into embeddings: model directories and the towers before alignment
* `supervised`  baselines trained on labels: ResNet-18, photometry MLP, redshift CNN; `fit` is their loop,
                `baselines` their runs
* `templates`   the classical redshift: redrock's templates fitted over a grid of redshifts
* `realsky`     real DESI and SDSS objects in the simulated index; `sky` the result's section on them
* `provabgs`    AstroCLIP's own pairs and the PROVABGS properties
* `report`      provenance and JSON
* `run`         the whole evaluation

What makes it a benchmark (releases, targets, rules, logs) is in `training.benchmark`. The numbers work on plain arrays;
only `encoders`, `survey`, `supervised`, `sky`, `realsky` and `provabgs` know models and files.
"""
