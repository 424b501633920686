"""What several codec tests compare with: transformers' reading of the default model's tokenizer, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers


@pytest.fixture(scope="session")
def reference(smollm2_path: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
