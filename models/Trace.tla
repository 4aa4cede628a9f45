-------------------------------- MODULE Trace --------------------------------
(* What real members and their database have done, as a behaviour of Replica: README.md. The module Recorded has the    *)
(* events. Each is a step of the model, or says what a state must show. Requests, answers and the steps of followers    *)
(* are not among them: they happen at the time of the commit that needs them. Unfinished is violated once each event    *)
(* has its place. A run without an error has met an event that no behaviour of the model explains.                      *)
EXTENDS Replica, Recorded

VARIABLE place      \* of the next event

Event == Events[place]
IsNext(what) == place <= Len(Events) /\ now = Event.now /\ Event.what = what /\ place' = place + 1
Numbers == [n \in 1..ChangesMax |-> ToString(n)]   \* in the place of Kinds: each change is another one

Wait1 == place <= Len(Events) /\ now < Event.now /\ Tick /\ UNCHANGED place

Request(m) ==
    /\ place <= Len(Events) /\ now = Event.now /\ Event.by = m /\ UNCHANGED place
    /\ \/ Event.what = "serve" /\ TakeOver(m)
       \/ Event.what = "renew" /\ Renew(m)
       \/ Event.what = "change" /\ Change(m)

Commit ==
    /\ \E request \in sent : IsNext(request.kind) /\ request.from = Event.by /\ Holds(request) /\ Take(request)
    /\ <<head'.term, head'.number>> = <<Event.term, Event.number>>

(* A line of an audit log: the member serves, and has the change that it acknowledges.                                  *)
Answer ==
    /\ IsNext("answer") /\ UNCHANGED vars
    /\ CanServe(Event.by) /\ term[Event.by] = Event.term /\ number[Event.by] >= Event.number

Other == \/ IsNext("release") /\ Release(Event.by) /\ head.term = Event.term
         \/ IsNext("leave") /\ Leave(Event.by)
         \/ IsNext("return") /\ Return(Event.by)

Quiet(m) == (Hear(m) \/ StandBy(m) \/ Follow(m)) /\ UNCHANGED place

TraceNext == Wait1 \/ Commit \/ Answer \/ Other \/ \E m \in Members : Request(m) \/ Quiet(m)
TraceSpec == Init /\ place = 1 /\ [][TraceNext]_<<vars, place>>
Unfinished == place <= Len(Events)
==============================================================================
