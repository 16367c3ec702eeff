"""A dense, unpaged decoder that applies a policy: what the engine is compared with.

Written from the papers' formulas in float64, one layer and one request at a time, with
explicit attention matrices. It shares no code with the package but the settings.
"""

from tests.oracle.decoder import Oracle, OracleResult
from tests.oracle.model import DenseModel

__all__ = ["DenseModel", "Oracle", "OracleResult"]
