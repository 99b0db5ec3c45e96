import base64
import io
from dataclasses import replace

import numpy as np
from PIL import Image
from pycocotools.mask import encode

from pipeline.data.read.features import FeatureBatch
from pipeline.report.detections import NUM_TAGS, found

# B=2, R=3: the second sample has two regions, far from each other.
BATCH = FeatureBatch(
    values=np.zeros((2, 3, 5), np.float16),
    boxes=np.array(
        [[[0.0, 0.1, 0.5, 0.5]] * 3, [[0.1, 0.2, 0.3, 0.4], [0.9, 0.6, 1.0, 0.7], [0] * 4]],
        np.float32,
    ),
    num_regions=np.array([3, 2], np.int32),
    labels=np.array([[1, 2, 2], [2, 7, 0]], np.int32),
    scores=np.array([[0.5, 0.9, 0.7], [0.25, 0.5, 0]], np.float32),
)
NAMES = ["background", "cat", "dog"]


def test_the_surest_region_is_tagged_and_none_over_another() -> None:
    first, second = found(BATCH, 0, NAMES, None, 4 / 3), found(BATCH, 1, NAMES, None, 4 / 3)
    assert first is not None
    assert second is not None
    assert [tag.text for tag in first.tags] == ["dog 0.90"]
    assert [tag.text for tag in second.tags] == ["class 7 0.50", "dog 0.25"]
    assert (second.tags[1].left, second.tags[1].top) == (10, 20)
    assert second.tags[0].left == 70  # moved, so that it ends within the picture
    assert first.masks == ""
    assert NUM_TAGS > 1


def test_tags_end_within_pictures_of_any_proportions() -> None:
    tall = found(BATCH, 1, NAMES, None, 0.5)
    wide = found(BATCH, 0, NAMES, None, 4.0)
    assert tall is not None
    assert wide is not None
    assert tall.tags[0].left == 20  # a tag takes 80 % of so narrow a picture
    assert wide.tags[0].top == 21  # and its height as much of so low a one


def test_regions_without_labels_have_no_layers() -> None:
    assert found(replace(BATCH, labels=None), 0, NAMES, None, 4 / 3) is None


def test_masks_lie_over_each_other_the_surest_on_top() -> None:
    bits = np.zeros((3, 4, 6), np.uint8)  # R=3, H=4, W=6
    bits[0, :, :4] = 1
    bits[1, :, 2:] = 1  # the surest
    masks = encode(np.asfortranarray(bits.transpose(1, 2, 0)))
    layers = found(BATCH, 0, NAMES, masks, 4 / 3)
    assert layers is not None
    picture = Image.open(io.BytesIO(base64.b64decode(layers.masks.partition(",")[2])))
    pixels = np.asarray(picture.convert("RGBA"))
    assert pixels.shape == (4, 6, 4)
    assert len(np.unique(pixels[0, :2], axis=0)) == 1
    assert len(np.unique(pixels[:, 2:].reshape(-1, 4), axis=0)) == 1  # nothing lies over it
    assert (pixels[0, 0] != pixels[0, 3]).any()
    assert (pixels[..., 3] > 0).all()
