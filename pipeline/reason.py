"""The reasons for which a record is no sample, or an image has no feature.

The list is closed: every reject of a dataset has one of these, by which `sightline data rejects`
counts and filters.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why something was rejected; `detail` beside it names the fault."""

    # What a source's files say, or do not say.
    MALFORMED_RECORD = "malformed-record"
    MALFORMED_ROW = "malformed-row"
    MALFORMED_TEXTS = "malformed-texts"
    DUPLICATE_ID = "duplicate-id"  # the key is listed more than once; its first record holds
    NO_KEY = "no-key"
    NO_SPLIT = "no-split"
    SEVERAL_SPLITS = "several-splits"
    NO_TEXTS = "no-texts"
    NO_CAPTIONS = "no-captions"
    EMPTY_CAPTIONS = "empty-captions"
    NO_ANSWERS = "no-answers"
    NO_ROUNDS = "no-rounds"
    UNKNOWN_IMAGE = "unknown-image"  # an annotation of an image that is listed nowhere
    UNKNOWN_QUESTION = "unknown-question"
    CAPTION_LENGTH = "caption-length"  # a filter's: no caption of a wanted length is left

    # What a name leads to.
    NO_IMAGE = "no-image"
    MISSING_IMAGE = "missing-image"
    UNKNOWN_SUFFIX = "unknown-suffix"
    NAME_NOT_UTF8 = "name-not-utf8"
    FORBIDDEN_LOCATION = "forbidden-location"  # it leads out of the folders that may be read
    LINK_LOOP = "link-loop"
    UNNAMED_FOLDER = "unnamed-folder"
    SPECIAL_FILE = "special-file"  # a link or a device in a tar
    SPARSE_MEMBER = "sparse-member"  # stored in pieces in a tar
    UNREADABLE_IMAGE = "unreadable-image"  # it was there when it was listed

    # What the bytes of an image are.
    NOT_AN_IMAGE = "not-an-image"
    TRUNCATED_IMAGE = "truncated-image"
    CORRUPT_IMAGE = "corrupt-image"
    UNDECODABLE_IMAGE = "undecodable-image"
    OVERSIZED_IMAGE = "oversized-image"
    UNSUPPORTED_PIXELS = "unsupported-pixels"
    UNDECODABLE_VIDEO = "undecodable-video"
    TRUNCATED_VIDEO = "truncated-video"
    UNDECODABLE_DICOM = "undecodable-dicom"
    NO_FRAMES = "no-frames"
    UNDECODABLE_FRAMES = "undecodable-frames"
    OVERSIZED_FRAMES = "oversized-frames"

    # What a recipe's filters leave out.
    TOO_SMALL = "too-small"
    EXTREME_ASPECT = "extreme-aspect"
    ANIMATED_IMAGE = "animated-image"
    DUPLICATE_IMAGE = "duplicate-image"
    NEAR_DUPLICATE = "near-duplicate"

    # Of a live sample: why an extractor has no feature of its image, beside what is above.
    UNUSABLE_IMAGE = "unusable-image"
    UNREADABLE_FEATURES = "unreadable-features"
    CONTRADICTORY_FEATURES = "contradictory-features"
    CUT_SHORT = "cut-short"
    NO_REGIONS = "no-regions"
    NOT_FINITE = "not-finite"
    BAD_BOXES = "bad-boxes"
    OTHER_LAYOUT = "other-layout"
