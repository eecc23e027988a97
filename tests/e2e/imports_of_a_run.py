"""What a run imports, except LanceDB, which starts a thread that would not be in a fork."""

import lance_namespace_urllib3_client  # noqa: F401 - most of what importing LanceDB takes
from transformers import (  # noqa: F401 - the demo model's classes
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from scalselect_assets import deployment, graph  # noqa: F401
from scalselect_assets.charts import in_dagster  # noqa: F401
from tests import all_methods  # noqa: F401
