"""`Accounts`: users, organisations and tokens, and who may do what."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from hub.refusal import Refusal, no_repository
from hub.repositories import Repository

# An organisation's roles that may see its private repositories, and those that may write to all of them.
CAN_READ = ("read", "write", "admin")
CAN_WRITE = ("write", "admin")


@dataclass
class Token:
    """An access token; `role` is "read" or "write"."""

    user: str
    role: str
    name: str
    expired: bool = False


@dataclass(frozen=True)
class Caller:
    """Who asks; nobody in particular without a token."""

    user: str | None = None
    role: str = "read"


@dataclass
class Accounts:
    """Users by name, organisations by name with the role of each member, tokens by their secret."""

    users: set[str] = field(default_factory=set)
    organizations: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)

    def add_token(self, user: str, role: str) -> str:
        secret = "hf_" + secrets.token_hex(17)
        self.tokens[secret] = Token(user, role, f"{user}-{role}-{len(self.tokens)}")
        return secret

    def caller(self, authorization: str | None) -> Caller:
        """Who sent a request; a token that is wrong or expired is refused even where none is needed."""
        if not authorization:
            return Caller()
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None or token.expired:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return Caller(token.user, token.role)

    def role_in(self, namespace: str, caller: Caller) -> str:
        if caller.user == namespace:
            return "admin"
        return self.organizations.get(namespace, {}).get(caller.user or "", "no_access")

    def require_sight(self, repository: Repository | None, caller: Caller) -> Repository:
        """Give the repository if the caller may know of it."""
        if repository and (not repository.private or self.role_in(repository.namespace, caller) in CAN_READ):
            return repository
        if caller.user:
            raise no_repository()
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")

    def require_files(self, repository: Repository, caller: Caller) -> None:
        """Refuse the files of a gated repository to whom was not let in."""
        member = self.role_in(repository.namespace, caller) in CAN_READ
        if not repository.gated or member or caller.user in repository.readers:
            return
        hint = "you are not in the authorized list" if caller.user else "you must be authenticated to access it"
        message = f"Access to {repository.kind} {repository.repo_id} is restricted and {hint}."
        raise Refusal(403 if caller.user else 401, message, "GatedRepo")

    def require_write(self, namespace: str, caller: Caller, what: str) -> str:
        """Refuse who may not write in a namespace; give the user's name."""
        if caller.user is None:
            raise Refusal(401, "Invalid username or password.")
        if caller.role != "write" or self.role_in(namespace, caller) not in CAN_WRITE:
            raise Refusal(403, f"You don't have the rights to {what} under the namespace {namespace!r}")
        return caller.user

    def who(self, secret: str) -> dict[str, Any]:
        """What whoami-v2 answers."""
        token = self.tokens[secret]
        memberships = {name: roles[token.user] for name, roles in self.organizations.items() if token.user in roles}
        return {
            "type": "user",
            "id": token.user.encode().hex().ljust(24, "0")[:24],
            "name": token.user,
            "fullname": token.user.capitalize(),
            "email": f"{token.user}@localhost",
            "emailVerified": True,
            "canPay": False,
            "isPro": False,
            "avatarUrl": f"/avatars/{token.user}.svg",
            "orgs": [
                {"type": "org", "id": name.encode().hex().ljust(24, "0")[:24], "name": name, "fullname": name}
                | {"roleInOrg": role, "isEnterprise": False, "canPay": False, "avatarUrl": f"/avatars/{name}.svg"}
                for name, role in memberships.items()
            ],
            "auth": {"type": "access_token", "accessToken": {"displayName": token.name, "role": token.role}},
        }
