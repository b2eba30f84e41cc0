package feed_test

import (
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

func Example() {
	log, view, fresh := new(feed.Log), new(feed.View), new(feed.Freshness)
	publish := func(e feed.Event) {
		if err := log.Append(next(log.Head(), e)); err != nil {
			panic(err)
		}
	}
	cursor := feed.NewCursor(view.Position())
	follow := func(now feed.Instant) {
		for d, ok := cursor.Next(log, 100); ok; d, ok = cursor.Next(log, 100) {
			if err := view.Apply(d, now); err != nil {
				panic(err)
			}
			fresh.Applied(view.Position())
		}
	}

	publish(feed.Event{Era: &feed.Era{Era: 1}})
	issued := subject(log.Head(), 1)
	follow(at(0))

	fresh.Sent("ping", at(1))
	publish(revokes(identity(1)))
	if _, err := fresh.Answered("ping", log.Head(), 200*time.Millisecond, view.Position()); err != nil {
		panic(err)
	}
	fmt.Println(fresh.Fresh(at(2), 5*time.Second), view.Judge(issued).Reason == revocation.Alive)
	follow(at(2))
	age, _ := fresh.Age(at(2))
	fmt.Println(fresh.Fresh(at(2), 5*time.Second), view.Judge(issued).Reason, age)
	// Output:
	// false true
	// true revoked 1.2s
}
