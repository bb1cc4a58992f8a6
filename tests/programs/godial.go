// godial ADDRESS: dials once and prints the error.
package main

import (
	"fmt"
	"net"
	"os"
	"time"
)

func main() {
	_, err := net.DialTimeout("tcp", os.Args[1], 5*time.Second)
	fmt.Println(err)
	if err != nil {
		os.Exit(1)
	}
}
