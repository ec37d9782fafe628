"""What the assistant can do: twenty functions and the phrasings that ask for them.

A phrasing is plain text with `{slots}`; a part in `[brackets]` is said only half of the time, and a slot that was not
said is absent from the call. No phrasing states an article before a slot whose words bring their own.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Function:
    """One callable of the assistant: its name, its slots in the order of the call, and how people ask for it."""

    name: str
    slots: tuple[str, ...]
    phrasings: tuple[str, ...]


def _function(name: str, slots: str, *phrasings: str) -> Function:
    return Function(name=name, slots=tuple(slots.split()), phrasings=phrasings)


FUNCTIONS: tuple[Function, ...] = (
    _function("light_on", "room", "turn on the {room} light", "switch the light on in the {room}", "{room} light on",
              "lights on in the {room}", "it is too dark in the {room}", "i need light in the {room}",
              "light up the {room}"),
    _function("light_off", "room", "turn off the {room} light", "switch the light off in the {room}",
              "{room} light off", "lights out in the {room}", "kill the {room} lights",
              "nobody needs light in the {room}", "make the {room} dark"),
    _function("set_light", "room level", "turn the {room} lamp to {level}", "dim the {room} light to {level}",
              "set the light in the {room} to {level}", "{room} lamp {level}", "i want the {room} lamp at {level}",
              "brightness of the {room} to {level}", "{level} light in the {room}"),
    _function("set_heating", "room degrees", "heat the {room} to {degrees}", "set the {room} to {degrees}",
              "make it {degrees} in the {room}", "{room} heating {degrees}", "warm up the {room} to {degrees}",
              "thermostat in the {room} to {degrees}", "i want {degrees} in the {room}"),
    _function("play_music", "playlist room", "play {playlist} [in the {room}]", "put on {playlist} [in the {room}]",
              "i want to hear {playlist} [in the {room}]", "music {playlist} [in the {room}]", "blast {playlist}",
              "let us listen to {playlist} [in the {room}]", "shuffle {playlist} [in the {room}]"),
    _function("set_volume", "room level", "set the volume to {level} [in the {room}]", "volume {level} [in the {room}]",
              "{room} speaker {level}", "turn the {room} speaker to {level}", "sound in the {room} to {level}",
              "make the music {level} [in the {room}]", "i want the speaker at {level}"),
    _function("start_device", "device time", "start the {device} [at {time}]", "turn on the {device} [at {time}]",
              "run the {device} [at {time}]", "switch on the {device}", "{device} on [at {time}]",
              "get the {device} going [at {time}]", "fire up the {device}"),
    _function("stop_device", "device", "stop the {device}", "turn off the {device}", "switch the {device} off",
              "{device} off", "shut down the {device}", "i am done with the {device}", "make the {device} stop"),
    _function("add_item", "item count", "add [{count}] {item} to the list", "we need [{count}] {item}",
              "put [{count}] {item} on the shopping list", "buy [{count}] {item}", "we are out of {item}",
              "get [{count}] {item} at the shop", "list {item} [{count}]"),
    _function("remove_item", "item", "remove {item} from the list", "take {item} off the list", "we have enough {item}",
              "cross out {item}", "no more {item}", "delete {item} from the shopping list", "we got {item} already"),
    _function("set_timer", "minutes task", "set a timer for {minutes} [for the {task}]", "timer {minutes} [for {task}]",
              "start a {task} timer of {minutes}", "wake me in {minutes}", "count down {minutes} [for the {task}]",
              "tell me when {minutes} are over", "{minutes} on the clock [for the {task}]"),
    _function("set_alarm", "time day", "set an alarm for {time} [on {day}]", "wake me up at {time} [on {day}]",
              "alarm {time} [on {day}]", "i have to get up at {time} [on {day}]", "ring the bell at {time} [on {day}]",
              "get me out of bed at {time}", "on {day} i rise at {time}"),
    _function("call_person", "person", "call {person}", "phone {person}", "ring {person}", "get {person} on the line",
              "i want to talk to {person}", "dial {person}", "give {person} a call"),
    _function("send_message", "person text", "tell {person} that {text}", "text {person} : {text}",
              "send {person} a message : {text}", "message {person} : {text}", "let {person} know that {text}",
              "write to {person} : {text}", "drop {person} a line : {text}"),
    _function("lock_door", "door", "lock the {door}", "close the {door}", "{door} locked", "secure the {door}",
              "is the {door} open ? lock it", "bolt the {door}", "make sure that the {door} is locked"),
    _function("unlock_door", "door", "unlock the {door}", "open the {door}", "{door} open", "let them in by the {door}",
              "release the {door}", "someone is at the {door} , let them in", "undo the {door} lock"),
    _function("set_blinds", "room level", "set the {room} blinds to {level}", "blinds in the {room} to {level}",
              "{room} blinds {level}", "lower the {room} blinds to {level}", "move the shades in the {room} to {level}",
              "i want the {room} shades at {level}", "blinds {level} in the {room}"),
    _function("clean_room", "room time", "vacuum the {room} [at {time}]", "clean the {room} [at {time}]",
              "send the vacuum to the {room} [at {time}]", "vacuum {room}", "the {room} is dirty",
              "sweep the {room} [at {time}]", "crumbs all over the {room}"),
    _function("set_scene", "scene time", "activate {scene} mode [at {time}]", "set the mood for {scene}",
              "switch to {scene} mode [at {time}]", "{scene} mode", "go to {scene} mode [at {time}]",
              "house in {scene} mode [at {time}]", "{scene} mood [at {time}]"),
    _function("feed_pet", "pet count", "feed the {pet} [{count} scoops]", "give the {pet} [{count} scoops of] food",
              "food for the {pet}", "the {pet} is hungry", "feed {pet} [{count} scoops]", "fill the {pet} bowl",
              "{pet} dinner [{count} scoops]"),
)  # fmt: skip
