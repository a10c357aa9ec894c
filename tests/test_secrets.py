import pytest

from rlvr.secrets import NOT_KEPT, is_secret, options_not_kept, without_secrets

SECRET = (
    *("key", "api_key", "apikey", "apiKey", "APIKey", "judgeApiKey", "judge_api_key", "x-api-key", "api_keys"),
    *("OPENAI_API_KEY", "access_key", "accessKey", "access_key_id", "aws_secret_access_key", "private_key"),
    *("token", "hf_token", "accessToken", "authtoken", "secret", "clientSecret", "password", "db_password", "passwd"),
    *("passphrase", "pwd", "credential", "credentials", "auth", "Authorization", "cookie"),
    *("access_tokens", "auth_tokens", "api_tokens", "hf_tokens", "api_key_2", "password1", "private_key_pem", "jwt"),
    *("answer_key",),  # by its name it cannot be told from a key: given again rather than stored
)
HARMLESS = (
    *("max_tokens", "tokens", "token_budget", "tokenizer", "keyword", "keywords", "monkey", "key_column", "keys"),
    *("author", "api_key_variable", "secretary", "passes", "turkey", "levels", "seed", "answer_column"),
    *("stop_tokens", "key_2_column", "author2"),
)


@pytest.mark.parametrize(("names", "expected"), [(SECRET, True), (HARMLESS, False)])
def test_secrets_are_known_by_their_names(names, expected):
    assert [name for name in names if is_secret(name) is not expected] == []


def test_secrets_are_left_out_however_deep_they_are():
    options = {
        "judge": {"url": "u", "headers": [{"Authorization": "hush"}, {"accept": "json"}]},
        "credentials": {"user": "hush", "password": "hush"},
        "api_key": None,
        "levels": [1, 2],
    }
    kept = without_secrets({"seed": 1, "token": "not an option of the environment", "env_options": options})
    assert kept["env_options"] == {
        "judge": {"url": "u", "headers": [{"Authorization": NOT_KEPT}, {"accept": "json"}]},
        "credentials": NOT_KEPT,
        "api_key": None,
        "levels": [1, 2],
    }
    assert (kept["seed"], kept["token"]) == (1, "not an option of the environment")
    assert options["credentials"]["user"] == "hush"
    assert options_not_kept(kept["env_options"]) == ["judge", "credentials"]
    assert options_not_kept(options) == []
    assert without_secrets({})["env_options"] == {}


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://user:hunter2@host/x", f"http://{NOT_KEPT}@host/x"),
        ("https://hf_token@host:8000/v1?a=b@c", f"https://{NOT_KEPT}@host:8000/v1?a=b@c"),
        ("postgresql://u:p@ss@db", f"postgresql://{NOT_KEPT}@db"),
        ("from http://a:b@x to http://c:d@y", f"from http://{NOT_KEPT}@x to http://{NOT_KEPT}@y"),
        *((same, same) for same in ("http://host/@me", "mail me@host", "http://host?at=@", f"http://{NOT_KEPT}@host")),
    ],
)
def test_users_and_passwords_in_addresses_are_left_out(address, shown):
    kept = without_secrets({"api_base_url": address, "env_options": {"judge": {"urls": [address]}}})
    assert kept == {"api_base_url": shown, "env_options": {"judge": {"urls": [shown]}}}
    assert options_not_kept(kept["env_options"]) == (["judge"] if NOT_KEPT in shown else [])
