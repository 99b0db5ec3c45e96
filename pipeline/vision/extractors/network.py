"""The settings that every frozen network has: storage, reduction, frames, window."""

from abc import abstractmethod

from pydantic import Field

from pipeline import storage
from pipeline.config import Config
from pipeline.vision.compress.pca import PcaConfig, ReducedExtractor, fit_to
from pipeline.vision.compress.storage_dtype import Storage
from pipeline.vision.extractor import Extractor
from pipeline.vision.extractors.frames import FramesExtractor, ImageExtractor, pyav_version
from pipeline.vision.preprocess.video import FramesConfig
from pipeline.vision.preprocess.window import AnyWindow


class NetworkConfig(Config):
    """What every frozen network has: none of it changes what the network does to a picture."""

    storage: Storage = Field(default="float16", description="the type that values are stored in")
    pca: PcaConfig | None = Field(default=None, description="fewer dimensions of values; null: all")
    frames: FramesConfig | None = Field(
        default=None, description="which frames of a video; null: pictures, and a video is refused"
    )
    window: AnyWindow = Field(
        default=None,
        description="of DICOM and 16-bit pictures: the values that become grey levels; stored: "
        "as the file says; null: all",
    )

    @abstractmethod
    def load(self, device: str) -> ImageExtractor:
        """Loads the network, which takes pictures one by one."""

    def check(self) -> None:
        """Raises ConfigError or FeatureError for what `build` would fail on, computing little."""
        if self.frames is not None:
            pyav_version()

    def build(self, device: str = "cpu") -> Extractor:
        """Loads the network, downloading `default` weights that are not in the cache.

        Raises FeatureError if weights, or a matrix of `pca`, cannot be had.
        """
        extractor = self.of_all_dimensions(device)
        return (
            extractor if self.pca is None else ReducedExtractor(extractor, self.pca, self.storage)
        )

    def of_all_dimensions(self, device: str = "cpu") -> Extractor:
        """Returns the extractor without `pca`, such as a matrix is fitted for."""
        network = self.load(device)
        if self.frames is None:
            return network
        return FramesExtractor(network, self.frames, self.storage, self.window)


def fit_if_absent(url: str, config: NetworkConfig) -> None:
    """Fits the matrix of `pca` to a dataset's images, if the config names one that is not there."""
    if config.pca is not None and not storage.exists(config.pca.matrix):
        fit_to(url, config.of_all_dimensions(), config.pca)
