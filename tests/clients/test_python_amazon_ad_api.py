"""PyPI's python-amazon-ad-api, unchanged but for its base URL, works through adsidecar.

It insists on fetching a token of its own, which adsidecar's token endpoint answers with a placeholder.
"""

import pytest
import requests
from ad_api.api import Profiles
from ad_api.api.sp import CampaignsV3
from ad_api.auth import access_token_client
from ad_api.base import AdvertisingApiException, Marketplaces


@pytest.fixture(autouse=True)
def no_token_of_another_test():
    """The library keeps fetched tokens in a cache of its module; each test fetches its own."""
    access_token_client.cache.clear()


def client_of(kind, sandbox):
    # The library refuses to start without credentials. These are placeholders: adsidecar uses its own.
    credentials = {"refresh_token": "unused", "client_id": "unused", "client_secret": "unused"}
    credentials["profile_id"] = sandbox.profile_id
    return kind(marketplace=Marketplaces.NA, credentials=credentials, timeout=30)


@pytest.fixture
def replaced(sandbox):
    """Creates clients whose base URL and token host are adsidecar's."""

    def make(kind, prefix=""):
        client = client_of(kind, sandbox)
        client.endpoint = sandbox.proxy + prefix
        client._auth.scheme, client._auth.host = "http://", sandbox.proxy.removeprefix("http://")
        return client

    return make


@pytest.fixture
def proxied(sandbox, monkeypatch):
    """Creates clients that keep Amazon's host names, with http:// URLs, and reach adsidecar through HTTP_PROXY."""
    monkeypatch.setenv("HTTP_PROXY", sandbox.proxy)

    def make(kind):
        client = client_of(kind, sandbox)
        client.endpoint = client.endpoint.replace("https://", "http://")
        client._auth.scheme = "http://"
        assert client.endpoint == "http://advertising-api.amazon.com"
        assert client._auth.scheme + client._auth.host + client._auth.path == "http://api.amazon.com/auth/o2/token"
        return client

    return make


@pytest.fixture(params=["replaced", "proxied"])
def make_client(request):
    """Both kinds of clients, one after the other."""
    return request.getfixturevalue(request.param)


def test_the_token_that_the_library_fetches_opens_nothing_at_amazon(make_client, sandbox):
    placeholder = make_client(Profiles).auth.access_token
    assert placeholder and not placeholder.startswith("Atza|"), "a real token left adsidecar"
    answer = requests.get(
        f"{sandbox.amazon}/v2/profiles",
        # The sandbox refuses a Connection header, which adsidecar must not forward; requests sends one.
        headers={"Authorization": f"Bearer {placeholder}", "Connection": None},
        verify=sandbox.ca_file,
        timeout=30,
    )
    assert answer.status_code == 403
    assert "not a valid key=value pair" in answer.text, "Amazon's gateway does not accept it as a token"


def test_the_library_reports_adsidecars_own_refusal(replaced):
    with pytest.raises(AdvertisingApiException) as refused:
        replaced(Profiles, prefix="/a/nobody").list_profiles()
    assert refused.value.code == 404
    assert refused.value.error["code"] == "unknown_account"


def test_it_lists_the_profiles(make_client, sandbox):
    profiles = make_client(Profiles).list_profiles().payload
    assert sandbox.profile_id in [str(profile["profileId"]) for profile in profiles]


def test_it_lists_the_sponsored_products_campaigns(make_client):
    answer = make_client(CampaignsV3).list_campaigns(body={"maxResults": 10})
    campaigns = answer.payload["campaigns"]
    assert campaigns and all(campaign["campaignId"] for campaign in campaigns)
