"""Sources: other people's formats, each read by one module and chosen in the recipe by `type`."""

from typing import Annotated

from pydantic import Field

from pipeline.data.sources.merged import MergedSourceConfig, SingleSource

AnySource = Annotated[SingleSource | MergedSourceConfig, Field(discriminator="type")]
