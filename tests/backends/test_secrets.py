"""A password shows nowhere: in no repr, no `vars()`, no error, no log, and no local of a frame that
an error page shows; whatever the form of the database URL and the key that holds it."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Iterator
from types import TracebackType
from urllib.parse import quote

import pytest

from django_asyncsession import ConfigurationError, DatabaseInterface
from django_asyncsession.backends.engines import make_wrapper
from django_asyncsession.backends.secrets import Secret, masked

SECRET = "tr0ub4dorAnd3"


def frames(trace: TracebackType | None) -> Iterator[str]:
    """The locals of each frame but the test's own."""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename != __file__:
            for name, value in trace.tb_frame.f_locals.items():
                yield f"{trace.tb_frame.f_code.co_name}: {name} = {value!r}"
        trace = trace.tb_next


def everything_of(error: BaseException | None) -> Iterator[str]:
    """All that anybody can find out about an error, with what it replaced, suppressed or not."""
    while error is not None:
        yield repr(error)
        yield "".join(traceback.format_exception_only(error))
        yield from frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def made(dsn: str) -> tuple[DatabaseInterface | None, BaseException | None]:
    try:
        return DatabaseInterface.from_dsn(dsn), None
    except ConfigurationError as error:
        return None, error


def shown(dsn: str) -> list[str]:
    """What shows of the interface of a database URL, or of why there is none."""
    db, error = made(dsn)
    if db is None:
        return list(everything_of(error))
    texts = [repr(db), db.alias, repr(vars(db)), repr(db.stats.__self__.__dict__)]
    try:
        wrapper = make_wrapper(db.alias, db._settings_dict)
        texts += [repr(wrapper.settings_dict), repr(vars(wrapper)), repr(wrapper)]
        texts.append(repr(db._pool_options()))
        texts.append(repr(wrapper.get_connection_params()))
    except Exception as failed:
        texts += everything_of(failed)
    return texts


FORMS = {
    "an address that is not closed": f"postgresql://u:{SECRET}@[::1/x",
    "a pool option that is no number": f"postgresql://u:{SECRET}@h/x?pool_max_size=abc",
    "a query parameter": f"postgresql://u@h/x?password={SECRET}",
    "a query parameter and a wrong one": f"postgresql://h/x?password={SECRET}&pool_max_size=abc",
    "MySQL's name for it": f"mysql://u@h/x?passwd={SECRET}",
    "a key's password": f"postgresql://u@h/x?sslpassword={SECRET}",
    "a server's option": f"postgresql://u@h/x?options=-c%20app.secret={SECRET}",
    "a token": f"postgresql://u@h/x?oauth_client_secret={SECRET}",
    "in the wrong place": f"postgresql://u@h/x?pool_password={SECRET}",
    "in a pool option": f"postgresql://u@h/x?pool_max_size={SECRET}",
    "a slash in it": f"postgresql://u:12/{SECRET}@h/x",
    "a question mark in it": f"postgresql://u:12?{SECRET}@h/x",
    "a number sign in it": f"postgresql://u:12#{SECRET}@h/x",
    "an at sign in it": f"postgresql://u:{SECRET}@{SECRET}@h/x",
    "no scheme": f"u:{SECRET}@h/x",
    "a scheme without slashes": f"postgresql:u:{SECRET}@h/x",
    "a port that is no number": f"postgresql://u:{SECRET}@h:port/x",
    "a port out of range": f"postgresql://u:{SECRET}@h:99999/x",
    "an unknown scheme": f"oracel://u:{SECRET}@h/x",
    "a broken escape": f"postgresql://u:{SECRET}%zz@h/x",
    "no user": f"postgresql://:{SECRET}@h/x",
    "a line break": f"postgresql://u:{SECRET}\n@h/x",
}


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_a_database_url_shows_its_password(form: str) -> None:
    assert not [text for text in shown(FORMS[form]) if SECRET in text]


PARTS = ["://", ":", "@", "/", "?", "#", "&", "=", "[", "]", "%", "%40", "::1", "h", "u", "12"]
PLACES = ["password", "passwd", "sslpassword", "ssl_key_password", "PASSWORD", "auth_token"]
SCHEMES = ["postgresql", "postgres", "postgis", "mysql", "sqlite", "oracle", "mssql"]


def random_url(rng: random.Random) -> str:
    """A URL with the password where a password may be, and damage anywhere but in it."""
    scheme, host = rng.choice(SCHEMES), rng.choice(["h", "[::1]", "[::1", "h:5432", "", "h:x"])
    secret = quote(rng.choice(["", "/", "@", "?", "#", "é"])) + SECRET
    user = f"u:{secret}@" if rng.random() < 0.6 else "u@"
    query = [f"{rng.choice(PLACES)}={secret}", "pool_max_size=abc", "pool_timeout=1", "x=", "&"]
    options = "&".join(rng.sample(query, rng.randrange(4)))
    url = f"{scheme}://{user}{host}/x?{options}"
    for _ in range(rng.randrange(3)):
        # Behind the password: what stands before it decides where it belongs.
        place = rng.randrange(url.rfind(SECRET) + len(SECRET), len(url) + 1) if SECRET in url else 0
        url = url[:place] + rng.choice(PARTS) + url[place:]
    return url


def test_five_hundred_damaged_urls_show_no_password() -> None:
    rng = random.Random(1807)
    for _ in range(500):
        url = random_url(rng)
        assert not [text for text in shown(url) if SECRET in text], url


def test_settings_are_masked_however_deep_and_stay_what_they_are() -> None:
    entry = {
        "PASSWORD": SECRET,
        "NAME": "x",
        "OPTIONS": {"passwd": SECRET, "ssl": {"key_password": SECRET}, "port": 5},
    }
    own = masked(entry)
    assert SECRET not in repr(own)
    assert own == entry and isinstance(own["OPTIONS"]["ssl"]["key_password"], Secret)


@pytest.mark.parametrize("key", ["password", "sslpassword", "passfile"])
async def test_a_refused_connection_shows_no_password_of_a_query_parameter(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    db = DatabaseInterface.from_dsn(f"postgresql://u@127.0.0.1:1/x?{key}={SECRET}")
    with pytest.raises(Exception) as caught:
        await db.connect()
    await db.close()
    assert not [text for text in everything_of(caught.value) if SECRET in text]
    assert SECRET not in caplog.text


WRONG = {
    "an unknown option of libpq": f"postgresql://u:{SECRET}@127.0.0.1:1/x?nonsense=1",
    "a server's option": f"postgresql://u:{SECRET}@127.0.0.1:1/x?options=-c%20nonsense%3D1",
    "a service that is none": f"postgresql://u:{SECRET}@127.0.0.1:1/x?service=nonsense",
    "no host of that name": f"postgresql://u:{SECRET}@nonsense.invalid/x",
    "MySQL: nobody answers": f"mysql://u:{SECRET}@127.0.0.1:1/x",
    "MySQL: an unknown option": f"mysql://u:{SECRET}@127.0.0.1:1/x?nonsense=1",
    "MySQL: a TLS mode that is refused": f"mysql://u:{SECRET}@127.0.0.1:1/x?ssl_mode=PREFERRED",
    "MySQL: no such file": f"mysql://u:{SECRET}@127.0.0.1:1/x?ssl_ca=/nonsense",
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_no_error_of_connecting_shows_the_password(
    wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does any error that another one replaced, or that the pool passes on to who waits."""
    caplog.set_level(logging.DEBUG)
    db = DatabaseInterface.from_dsn(WRONG[wrong])
    try:
        for _ in range(2):
            with pytest.raises(Exception) as caught:
                async with db.get_session() as session:
                    await session.execute("SELECT 1")
            assert not [text for text in everything_of(caught.value) if SECRET in text]
    finally:
        await db.close()
    assert SECRET not in caplog.text


def test_an_interface_made_of_settings_shows_no_password() -> None:
    entry = {**DatabaseInterface.from_dsn(f"postgresql://u:{SECRET}@h/x")._settings_dict}
    entry["PASSWORD"] = SECRET
    db = DatabaseInterface("own", entry)
    assert SECRET not in repr(vars(db)) and db._settings_dict["PASSWORD"] == SECRET
