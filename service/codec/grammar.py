"""What a client wants its answer to look like, as text in llguidance's grammar language: checked here, compiled in the engine.

Fails closed: a keyword that the library can't hold is refused by name. No HTTP, no engine. Called by the API and by reply.
"""

from __future__ import annotations
