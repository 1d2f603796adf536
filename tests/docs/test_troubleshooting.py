"""docs/troubleshooting.md quotes what the program says, and not what it once said."""

from tests.docs.messages import COMPOSED, FOREIGN, code, fixed_parts, messages, quoted, says


def test_every_message_that_the_page_quotes_is_in_the_source() -> None:
    texts = list(messages())
    own = [message for message in quoted() if message not in FOREIGN and message not in COMPOSED]
    assert len(own) > 60
    stale = [message for message in own if not any(says(message, text) for text in texts)]
    assert not stale


def test_messages_that_are_put_together_are_in_the_source() -> None:
    assert set(COMPOSED) <= set(quoted())
    text = code()
    assert all(part in text for part in COMPOSED.values())


def test_messages_of_other_programs_are_on_the_page() -> None:
    assert set(FOREIGN) <= set(quoted())


def test_a_quoted_message_has_enough_words_to_be_found_by() -> None:
    for message in quoted():
        if message not in FOREIGN:
            assert len("".join(fixed_parts(message))) >= 12, message


def test_no_message_is_listed_twice() -> None:
    assert len(set(quoted())) == len(quoted())


def test_a_message_that_is_gone_is_found_out() -> None:
    text = "--batch \0 does not divide by \0 processes; nearest that do: \0"
    assert says("--batch ... does not divide by ... processes", text)
    assert not says("--batch ... does not divide by ... ranks", text)
    assert not says("processes ... does not divide by", text)  # the order counts
