"""Sources: other people's formats, each read by one module and chosen in the recipe by `type`."""

from typing import Annotated

from pydantic import Field

from pipeline.data.sources.coco_captions import CocoCaptionsSourceConfig
from pipeline.data.sources.shapes import ShapesSourceConfig

AnySource = Annotated[ShapesSourceConfig | CocoCaptionsSourceConfig, Field(discriminator="type")]
