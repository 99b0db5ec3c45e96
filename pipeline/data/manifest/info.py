"""The summary of a dataset: what it holds, what was rejected and why."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import foreign_tars

REJECT_COLUMNS = ("key", "split", "reason", "detail")
_COUNTS = ("num_captions", "num_questions", "num_rounds")


def describe(url: str, version: int | None = None) -> dict[str, Any]:
    """Returns splits, rejects by reason, features and version as plain data.

    Raises ManifestError if there is no dataset.
    """
    manifest = Manifest.open(url, version)
    samples = manifest.samples(["split", "shard", "tar", "image_size", "texts_size", *_COUNTS])
    splits = {}
    for name in sorted(pc.unique(samples["split"]).to_pylist()):
        rows = samples.filter(pc.equal(samples["split"], name))
        splits[name] = {
            "samples": rows.num_rows,
            "shards": len(pc.unique(rows["shard"])),
            "tars": len(foreign_tars(rows["tar"])[0]),  # of others, that keep their images
            **{count.removeprefix("num_"): pc.sum(rows[count]).as_py() for count in _COUNTS},
            "bytes": pc.sum(rows["image_size"]).as_py() + pc.sum(rows["texts_size"]).as_py(),
        }
    rejects = Counter(manifest.rejects(["reason"])["reason"].to_pylist())
    features, feature_rejects = {}, {}
    for name in manifest.extractors():
        features[name] = manifest.features(name).rows(["reason"])["reason"].null_count
        reasons = Counter(_feature_rejects(manifest, name)["reason"].to_pylist())
        if reasons:
            feature_rejects[name] = dict(reasons.most_common())
    return {
        "dataset": manifest.url,
        "version": manifest.version,
        "versions": len(manifest.versions()),
        "splits": splits,
        "rejects": dict(rejects.most_common()),
        "features": features,
        "feature_rejects": feature_rejects,
    }


def rejects(url: str, version: int | None = None, reason: str | None = None) -> pa.Table:
    """Returns key, split, reason and detail of the rejects, or of those with a reason.

    Live samples of whose image an extractor could make nothing are among them, with its name.
    Sorted by reason and key. Raises ManifestError if there is no dataset.
    """
    manifest = Manifest.open(url, version)
    without = [_feature_rejects(manifest, name) for name in manifest.extractors()]
    found = pa.concat_tables([manifest.rejects(REJECT_COLUMNS), *without])
    if reason is not None:
        found = found.filter(pc.equal(found["reason"], reason))
    return found.sort_by([("reason", "ascending"), ("key", "ascending")])


def _feature_rejects(manifest: Manifest, extractor: str) -> pa.Table:
    """Returns the live samples of which an extractor could make nothing."""
    samples = manifest.samples(["key", "split", "shard"])
    listed = manifest.features(extractor).rejects()
    found = samples.join(listed, ["key", "shard"], join_type="inner").select(REJECT_COLUMNS)
    detail = pc.binary_join_element_wise(extractor, found["detail"], ": ")
    return found.set_column(REJECT_COLUMNS.index("detail"), "detail", detail)
