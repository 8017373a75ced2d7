"""The science benchmark as others can repeat it: what is measured on, what counts, and how a result is shown to be one.

* `release`     data releases: split, digests and fingerprints of every shard; is a folder that release?
* `fingerprint` what identifies a column of a shard, to the bit and to a tolerance
* `targets`     the marks, and their judging against a result
* `mllog`       MLPerf-logging lines, written and read
* `timing`      time and samples to a quality, from training logs
* `compliance`  the rules of `rules.toml` against a log
* `schema`      the result's JSON Schema (`result.schema.json`) and its check

`training.evaluate` measures; nothing here imports torch.
"""
