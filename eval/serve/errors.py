"""`RequestRefused`: what a client did wrong, in the form of OpenAI's interface."""

from typing import Any


class RequestRefused(Exception):
    """A request that is not computed; the message says which field, the rule, and what would be right."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        """Describe the refusal.

        Args:
            param: field of the request that is at fault.
            code: OpenAI's word for the case, where it has one.
            status: status of HTTP.
        """
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
